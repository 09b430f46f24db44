//! All policies and tools, prepared for decisions.
//!
//! Enters: what was checked, then calls. Leaves: decisions. Never: a policy that is not asked. One that cannot match a tool,
//! by its head, is left out for that tool; Cedar would look at each policy for each call.

use std::{
    collections::{HashMap, HashSet},
    fmt,
};

use cedar_policy::{
    ActionConstraint, Authorizer, Context, Entities, EntityUid, PolicySet, PrincipalConstraint, Request,
    ResourceConstraint, Response, RestrictedExpression,
};

use super::{
    Alternative, Call, Decision, Denial, Outcome, Subject, arguments,
    entities::{EntityError, Types, entity},
    policies::Written,
    scan::{self, scan},
};
use crate::policy::{
    diagnostic::Place,
    model::{Model, Record},
};

/// What decides. Without policies, everything is denied.
#[derive(Default)]
pub struct Actions {
    authorizer: Authorizer,
    tools: Vec<Tool>,
    /// By name.
    numbers: HashMap<String, usize>,
    callers: Vec<Caller>,
    policies: Vec<Policy>,
    /// By name.
    ids: HashMap<String, usize>,
    /// Policies that can match the same tools, by their heads.
    groups: Vec<Group>,
}

/// One action policy.
#[derive(Clone, Debug)]
pub struct Policy {
    pub id: String,
    pub permits: bool,
    /// Index and name of whose approval it needs.
    pub approval: Option<(usize, String)>,
    /// Whether it says more than who, what and on what.
    pub conditional: bool,
    /// Names that it compares with the issuer of whom the caller acts for.
    pub issuers: Vec<String>,
    pub place: Place,
    /// Whether the same caller and tool always get the same from it.
    constant: bool,
    principal: PrincipalConstraint,
}

struct Tool {
    name: String,
    action: EntityUid,
    resource: EntityUid,
    arguments: Record,
    other_arguments: bool,
    /// All that its policies can look at but the caller.
    entities: Entities,
    /// What they look at of a call.
    context: scan::Context,
    groups: Vec<usize>,
}

struct Caller {
    uid: EntityUid,
    parents: HashSet<EntityUid>,
    attributes: HashMap<String, RestrictedExpression>,
}

struct Group {
    set: PolicySet,
    /// Those that the same caller always gets the same from.
    constant: PolicySet,
    members: Vec<usize>,
}

/// A call, as Cedar is asked about it.
pub struct Prepared {
    pub request: Request,
    pub entities: Entities,
}

impl fmt::Debug for Actions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Actions").field("tools", &self.tools.len()).field("policies", &self.policies.len()).finish()
    }
}

impl Actions {
    pub(super) fn new(model: &Model, written: Vec<Written>) -> Result<Self, EntityError> {
        let types = Types::new()?;
        let mut actions = Self::default();
        for tool in &model.tools {
            actions.numbers.insert(tool.name.clone(), actions.tools.len());
            actions.tools.push(Tool {
                name: tool.name.clone(),
                action: types.action(&tool.name),
                resource: types.tool(&tool.name),
                arguments: tool.arguments.clone(),
                other_arguments: tool.other_arguments,
                entities: Entities::empty(),
                context: scan::Context::default(),
                groups: Vec::new(),
            });
        }
        actions.callers.extend(model.workloads.iter().map(|workload| Caller {
            uid: types.workload(&workload.name),
            parents: types.parents_of_workload(workload),
            attributes: types.attributes_of_workload(workload),
        }));
        let looked_into = actions.group(model, &types, written)?;
        for (tool, named) in actions.tools.iter_mut().zip(&model.tools) {
            let mut entities = types.tool_with_all(named, model)?;
            for uid in tool.groups.iter().flat_map(|group| &looked_into[*group]) {
                entities.extend(types.named(uid, model)?);
            }
            // One entity for each name.
            let mut seen = HashSet::new();
            entities.retain(|entity| seen.insert(entity.uid()));
            tool.entities = Entities::from_entities(entities, None).map_err(EntityError::of)?;
        }
        Ok(actions)
    }

    /// Puts policies together that can match the same tools. Returns the entities that each group looks into.
    fn group(
        &mut self,
        model: &Model,
        types: &Types,
        written: Vec<Written>,
    ) -> Result<Vec<HashSet<EntityUid>>, EntityError> {
        let ancestors: Vec<_> = model.tools.iter().map(|tool| types.ancestors_of_tool(tool, model)).collect();
        let all_tools = types.action(super::schema::ALL_TOOLS);
        let mut by_tools: HashMap<Vec<usize>, usize> = HashMap::new();
        let mut looked_into: Vec<HashSet<EntityUid>> = Vec::new();
        for Written { id, policy, place, approval } in written {
            let looks = scan(&policy);
            let approval = approval.and_then(|name| {
                let index = model.approvers.iter().position(|approvers| approvers.name == name)?;
                Some((index, name))
            });
            let (action, resource) = (policy.action_constraint(), policy.resource_constraint());
            let tools = self.tools.iter().zip(&ancestors).enumerate().filter(|(_, (tool, ancestors))| {
                let is_action = |uid: &EntityUid| *uid == tool.action || *uid == all_tools;
                let is_in = |uid: &EntityUid| *uid == tool.resource || ancestors.contains(uid);
                let action = match &action {
                    ActionConstraint::Any => true,
                    ActionConstraint::Eq(uid) => *uid == tool.action,
                    ActionConstraint::In(uids) => uids.iter().any(is_action),
                };
                action
                    && match &resource {
                        ResourceConstraint::Any => true,
                        ResourceConstraint::Eq(uid) => *uid == tool.resource,
                        ResourceConstraint::In(uid) => is_in(uid),
                        ResourceConstraint::Is(kind) => kind == tool.resource.type_name(),
                        ResourceConstraint::IsIn(kind, uid) => kind == tool.resource.type_name() && is_in(uid),
                    }
            });
            let tools: Vec<usize> = tools.map(|(index, _)| index).collect();
            let group = *by_tools.entry(tools.clone()).or_insert_with(|| {
                self.groups.push(Group { set: PolicySet::new(), constant: PolicySet::new(), members: Vec::new() });
                looked_into.push(HashSet::new());
                for tool in &tools {
                    self.tools[*tool].groups.push(self.groups.len() - 1);
                }
                self.groups.len() - 1
            });
            for tool in tools {
                self.tools[tool].context.extend(&looks.at);
            }
            looked_into[group].extend(looks.into);
            self.groups[group].members.push(self.policies.len());
            self.ids.insert(id.clone(), self.policies.len());
            self.policies.push(Policy {
                id,
                permits: policy.effect() == cedar_policy::Effect::Permit,
                approval,
                conditional: policy.has_non_scope_constraint(),
                issuers: looks.issuers,
                constant: !looks.at_call,
                principal: policy.principal_constraint(),
                place,
            });
            if !looks.at_call {
                self.groups[group].constant.add(policy.clone()).map_err(EntityError::of)?;
            }
            self.groups[group].set.add(policy).map_err(EntityError::of)?;
        }
        Ok(looked_into)
    }

    pub fn decide(&self, call: &Call<'_>) -> Decision {
        let Some(tool) = self.numbers.get(call.tool).map(|index| &self.tools[*index]) else {
            return Decision::denied(Denial::UnknownTool);
        };
        match self.prepare(call) {
            Ok(prepared) => self.judge(tool, &prepared),
            Err(denial) => Decision::denied(denial),
        }
    }

    /// What Cedar is asked: of the context, what the tool's policies look at.
    pub fn prepare(&self, call: &Call<'_>) -> Result<Prepared, Denial> {
        let tool = self.numbers.get(call.tool).map(|index| &self.tools[*index]).ok_or(Denial::UnknownTool)?;
        self.prepare_with(call, tool, &tool.context)
    }

    /// The same with everything that a call says.
    #[cfg(test)]
    pub fn prepare_everything(&self, call: &Call<'_>) -> Prepared {
        let tool = &self.tools[self.numbers[call.tool]];
        self.prepare_with(call, tool, &scan::Context::everything()).unwrap()
    }

    fn prepare_with(&self, call: &Call<'_>, tool: &Tool, wanted: &scan::Context) -> Result<Prepared, Denial> {
        let caller = self.callers.get(call.workload).ok_or(Denial::UnknownWorkload)?;
        let arguments = arguments::read(&tool.arguments, tool.other_arguments, call.arguments, wanted)?;
        // Everything in it was checked: what fails here fails as a policy would.
        let failed = |error: &dyn fmt::Display| Denial::PolicyError(error.to_string());
        let context = context(call, arguments, wanted).map_err(|error| failed(&error))?;
        let context = Context::from_pairs(context).map_err(|error| failed(&error))?;
        let request = Request::new(caller.uid.clone(), tool.action.clone(), tool.resource.clone(), context, None);
        let request = request.map_err(|error| failed(&error))?;
        let entities = caller.entities(tool, Some((call.spiffe_id, call.instance))).map_err(|error| failed(&error))?;
        Ok(Prepared { request, entities })
    }

    fn judge(&self, tool: &Tool, prepared: &Prepared) -> Decision {
        let mut said = Said::default();
        for group in &tool.groups {
            let response =
                self.authorizer.is_authorized(&prepared.request, &self.groups[*group].set, &prepared.entities);
            self.hear(&response, &mut said);
        }
        let Said { mut permits, mut forbids, mut failed, message } = said;
        let (outcome, policies) = if let Some(message) = message {
            (Outcome::Denied(Denial::PolicyError(message)), &mut failed)
        } else if !forbids.is_empty() {
            (Outcome::Denied(Denial::Forbidden), &mut forbids)
        } else if permits.is_empty() {
            (Outcome::Denied(Denial::NotPermitted), &mut permits)
        } else if permits.iter().any(|policy| policy.approval.is_none()) {
            permits.retain(|policy| policy.approval.is_none());
            (Outcome::Allowed, &mut permits)
        } else {
            let alternatives = permits.iter().filter_map(|policy| {
                let (approvers, name) = policy.approval.clone()?;
                Some(Alternative { approvers, name, policy: policy.id.clone() })
            });
            let mut alternatives: Vec<Alternative> = alternatives.collect();
            alternatives.sort();
            (Outcome::Pending(alternatives), &mut permits)
        };
        let mut policies: Vec<String> = policies.iter().map(|policy| policy.id.clone()).collect();
        policies.sort();
        Decision { outcome, policies }
    }

    fn hear<'a>(&'a self, response: &Response, said: &mut Said<'a>) {
        for error in response.diagnostics().errors() {
            let cedar_policy::AuthorizationError::PolicyEvaluationError(error) = error;
            said.failed.extend(self.policy(error.policy_id().as_ref()));
            said.message.get_or_insert_with(|| error.inner().to_string());
        }
        for policy in response.diagnostics().reason().filter_map(|id| self.policy(id.as_ref())) {
            if policy.permits { said.permits.push(policy) } else { said.forbids.push(policy) }
        }
    }

    /// Names of tools of which some call by this workload could be allowed or approved. Some of them may never be, whatever the
    /// arguments: only what cannot depend on the call is decided here.
    pub fn may_call(&self, workload: usize) -> Vec<&str> {
        let Some(caller) = self.callers.get(workload) else { return Vec::new() };
        let may = |tool: &&Tool| self.may(caller, tool);
        self.tools.iter().filter(may).map(|tool| tool.name.as_str()).collect()
    }

    fn may(&self, caller: &Caller, tool: &Tool) -> bool {
        // Nothing that is constant looks at what is left out here.
        let asked = || {
            let request =
                Request::new(caller.uid.clone(), tool.action.clone(), tool.resource.clone(), Context::empty(), None);
            Some((request.ok()?, caller.entities(tool, None).ok()?))
        };
        let Some((request, entities)) = asked() else { return true };
        let mut said = Said::default();
        let mut varying = false;
        for group in tool.groups.iter().map(|group| &self.groups[*group]) {
            self.hear(&self.authorizer.is_authorized(&request, &group.constant, &entities), &mut said);
            let members = group.members.iter().map(|member| &self.policies[*member]);
            varying |= members.into_iter().any(|p| p.permits && !p.constant && p.is_about(caller));
        }
        // Whatever fails without looking at the call fails with every call.
        said.message.is_none() && said.forbids.is_empty() && (varying || !said.permits.is_empty())
    }

    pub fn policies(&self) -> &[Policy] {
        &self.policies
    }

    pub fn policy(&self, id: &str) -> Option<&Policy> {
        self.ids.get(id).map(|index| &self.policies[*index])
    }

    /// Policies that can match a tool, by their heads.
    pub fn policies_of<'a>(&'a self, tool: &str) -> impl Iterator<Item = &'a Policy> {
        let groups = self.numbers.get(tool).map(|index| self.tools[*index].groups.as_slice()).unwrap_or_default();
        groups.iter().flat_map(|group| &self.groups[*group].members).map(|index| &self.policies[*index])
    }

    /// Policies that match no tool, by their heads.
    pub fn idle(&self) -> impl Iterator<Item = &Policy> {
        let used: HashSet<usize> = self.tools.iter().flat_map(|tool| tool.groups.iter().copied()).collect();
        let groups = self.groups.iter().enumerate().filter(move |(index, _)| !used.contains(index));
        groups.flat_map(|(_, group)| &group.members).map(|index| &self.policies[*index])
    }

    /// All policies in one set, as who knows nothing of tools would ask them.
    pub fn policy_set(&self) -> PolicySet {
        let policies = self.groups.iter().flat_map(|group| group.set.policies().cloned());
        PolicySet::from_policies(policies).unwrap_or_default()
    }
}

/// What the policies say of one call.
#[derive(Default)]
struct Said<'a> {
    permits: Vec<&'a Policy>,
    forbids: Vec<&'a Policy>,
    failed: Vec<&'a Policy>,
    /// What the first one failed by.
    message: Option<String>,
}

impl Policy {
    fn is_about(&self, caller: &Caller) -> bool {
        let is_in = |uid: &EntityUid| *uid == caller.uid || caller.parents.contains(uid);
        match &self.principal {
            PrincipalConstraint::Any => true,
            PrincipalConstraint::Eq(uid) => *uid == caller.uid,
            PrincipalConstraint::In(uid) => is_in(uid),
            PrincipalConstraint::Is(kind) => kind == caller.uid.type_name(),
            PrincipalConstraint::IsIn(kind, uid) => kind == caller.uid.type_name() && is_in(uid),
        }
    }
}

impl Caller {
    /// What a tool's policies can look at, with the caller.
    fn entities(&self, tool: &Tool, instance: Option<(&str, &str)>) -> Result<Entities, EntityError> {
        let mut attributes = self.attributes.clone();
        if let Some((spiffe_id, instance)) = instance {
            attributes.insert("spiffe_id".to_owned(), RestrictedExpression::new_string(spiffe_id.to_owned()));
            attributes.insert("instance".to_owned(), RestrictedExpression::new_string(instance.to_owned()));
        }
        let caller = entity(self.uid.clone(), attributes, self.parents.clone())?;
        tool.entities.clone().add_entities([caller], None).map_err(EntityError::of)
    }
}

fn context(
    call: &Call<'_>,
    arguments: RestrictedExpression,
    wanted: &scan::Context,
) -> Result<Vec<(String, RestrictedExpression)>, EntityError> {
    let mut context = Vec::new();
    let mut add = |name: &str, make: &dyn Fn() -> Result<RestrictedExpression, EntityError>| {
        if wanted.has(name) {
            context.push((name.to_owned(), make()?));
        }
        Ok(())
    };
    add("arguments", &|| Ok(arguments.clone()))?;
    add("now", &|| Ok(arguments::datetime(call.now)))?;
    add("actors", &|| Ok(texts(call.actors)))?;
    add("depth", &|| Ok(RestrictedExpression::new_long(i64::try_from(call.actors.len()).unwrap_or(i64::MAX))))?;
    if let Some(Subject { issuer, id, scopes, audience, client }) = call.subject {
        add("subject", &|| {
            let text = |text: &String| RestrictedExpression::new_string(text.clone());
            let client = client.as_ref().map(|client| ("client".to_owned(), text(client)));
            let fields = [
                ("issuer".to_owned(), text(issuer)),
                ("id".to_owned(), text(id)),
                ("scopes".to_owned(), texts(scopes)),
                ("audience".to_owned(), texts(audience)),
            ];
            RestrictedExpression::new_record(fields.into_iter().chain(client)).map_err(EntityError::of)
        })?;
    }
    Ok(context)
}

fn texts(texts: &[String]) -> RestrictedExpression {
    RestrictedExpression::new_set(texts.iter().cloned().map(RestrictedExpression::new_string))
}
