//! What policies name: workloads, tools, services, servers, tenants, as Cedar entities.
//!
//! Enters: the model. Leaves: names and entities. Never: anything of a call but who makes it.

use std::collections::{HashMap, HashSet};

use cedar_policy::{Entity, EntityId, EntityTypeName, EntityUid, RestrictedExpression};

use super::schema::ALL_TOOLS;
use crate::policy::{
    file::Sensitivity,
    model::{Model, Service, Tool, Workload},
};

/// What Cedar says of an entity that cannot be made. Nothing that a policy says leads to it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct EntityError(String);

impl EntityError {
    pub fn of(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// Names of types, read once: each look at a name would parse it.
#[derive(Clone, Debug)]
pub struct Types {
    action: EntityTypeName,
    kind: EntityTypeName,
    sensitivity: EntityTypeName,
    tenant: EntityTypeName,
    workload: EntityTypeName,
    service: EntityTypeName,
    server: EntityTypeName,
    tool: EntityTypeName,
}

impl Types {
    pub fn new() -> Result<Self, EntityError> {
        let named = |name: &str| name.parse().map_err(|error| EntityError(format!("type {name}: {error}")));
        Ok(Self {
            action: named("Action")?,
            kind: named("Kind")?,
            sensitivity: named("Sensitivity")?,
            tenant: named("Tenant")?,
            workload: named("Workload")?,
            service: named("Service")?,
            server: named("McpServer")?,
            tool: named("Tool")?,
        })
    }

    pub fn action(&self, name: &str) -> EntityUid {
        uid(&self.action, name)
    }

    pub fn workload(&self, name: &str) -> EntityUid {
        uid(&self.workload, name)
    }

    pub fn tool(&self, name: &str) -> EntityUid {
        uid(&self.tool, name)
    }

    /// What the caller is in.
    pub fn parents_of_workload(&self, workload: &Workload) -> HashSet<EntityUid> {
        let kind = uid(&self.kind, workload.kind.name());
        workload.tenant.iter().map(|tenant| uid(&self.tenant, tenant)).chain([kind]).collect()
    }

    /// What does not differ from call to call.
    pub fn attributes_of_workload(&self, workload: &Workload) -> HashMap<String, RestrictedExpression> {
        let kind = RestrictedExpression::new_entity_uid(uid(&self.kind, workload.kind.name()));
        let name = RestrictedExpression::new_string(workload.name.clone());
        let fixed = [("name".to_owned(), name), ("kind".to_owned(), kind)];
        fixed.into_iter().chain(self.place(workload.tenant.as_deref(), workload.environment.as_deref())).collect()
    }

    /// What a tool is in, all of it.
    pub fn ancestors_of_tool(&self, tool: &Tool, model: &Model) -> HashSet<EntityUid> {
        let service = tool.service.map(|index| &model.services[index]);
        let tenant = service.and_then(|service| service.tenant.as_ref()).map(|tenant| uid(&self.tenant, tenant));
        let server = tool.server.map(|index| uid(&self.server, &model.mcp_servers[index].name));
        service.map(|service| uid(&self.service, &service.name)).into_iter().chain(tenant).chain(server).collect()
    }

    /// A tool with everything that can be reached from it.
    pub fn tool_with_all(&self, tool: &Tool, model: &Model) -> Result<Vec<Entity>, EntityError> {
        let service = tool.service.map(|index| &model.services[index]);
        let mut entities = vec![self.tool_entity(tool, model)?, self.action_entity(tool)];
        entities.extend(service.map(|service| self.service_entity(service)).transpose()?);
        entities.extend(tool.server.map(|index| self.server_entity(&model.mcp_servers[index].name)).transpose()?);
        Ok(entities)
    }

    /// Cedar takes an action to be in a group only if an entity says so: the schema is not asked when it decides.
    fn action_entity(&self, tool: &Tool) -> Entity {
        Entity::new_no_attrs(self.action(&tool.name), HashSet::from([self.action(ALL_TOOLS)]))
    }

    /// An entity that a policy names, with everything that can be reached from it. `None` for what has no attributes.
    pub fn named(&self, uid: &EntityUid, model: &Model) -> Result<Vec<Entity>, EntityError> {
        let (kind, name) = (uid.type_name(), uid.id().unescaped());
        if *kind == self.tool {
            let tool = model.tools.iter().find(|tool| tool.name == name);
            return tool.map_or(Ok(Vec::new()), |tool| self.tool_with_all(tool, model));
        }
        if *kind == self.service {
            let service = model.services.iter().find(|service| service.name == name);
            return service.into_iter().map(|service| self.service_entity(service)).collect();
        }
        if *kind == self.server {
            return Ok(vec![self.server_entity(name)?]);
        }
        Ok(Vec::new())
    }

    fn tool_entity(&self, tool: &Tool, model: &Model) -> Result<Entity, EntityError> {
        let service = tool.service.map(|index| &model.services[index]);
        let sensitivity = service.map_or(Sensitivity::Low, |service| service.sensitivity);
        let reference = |uid| RestrictedExpression::new_entity_uid(uid);
        let mut attributes: HashMap<String, RestrictedExpression> = HashMap::from([
            ("name".to_owned(), RestrictedExpression::new_string(tool.name.clone())),
            ("sensitivity".to_owned(), reference(uid(&self.sensitivity, sensitivity.name()))),
        ]);
        if let Some(service) = service {
            attributes.insert("service".to_owned(), reference(uid(&self.service, &service.name)));
            attributes.extend(self.place(service.tenant.as_deref(), service.environment.as_deref()));
        }
        if let Some(server) = tool.server {
            attributes.insert("server".to_owned(), reference(uid(&self.server, &model.mcp_servers[server].name)));
        }
        entity(uid(&self.tool, &tool.name), attributes, self.ancestors_of_tool(tool, model))
    }

    fn service_entity(&self, service: &Service) -> Result<Entity, EntityError> {
        let sensitivity = RestrictedExpression::new_entity_uid(uid(&self.sensitivity, service.sensitivity.name()));
        let name = RestrictedExpression::new_string(service.name.clone());
        let fixed = [("name".to_owned(), name), ("sensitivity".to_owned(), sensitivity)];
        let place = self.place(service.tenant.as_deref(), service.environment.as_deref());
        let parents = service.tenant.iter().map(|tenant| uid(&self.tenant, tenant)).collect();
        entity(uid(&self.service, &service.name), fixed.into_iter().chain(place).collect(), parents)
    }

    fn server_entity(&self, name: &str) -> Result<Entity, EntityError> {
        let attributes = HashMap::from([("name".to_owned(), RestrictedExpression::new_string(name.to_owned()))]);
        entity(uid(&self.server, name), attributes, HashSet::new())
    }

    fn place(&self, tenant: Option<&str>, environment: Option<&str>) -> Vec<(String, RestrictedExpression)> {
        let tenant = tenant.map(|tenant| RestrictedExpression::new_entity_uid(uid(&self.tenant, tenant)));
        let environment = environment.map(|text| RestrictedExpression::new_string(text.to_owned()));
        let named = |name: &str, value: Option<RestrictedExpression>| value.map(|value| (name.to_owned(), value));
        named("tenant", tenant).into_iter().chain(named("environment", environment)).collect()
    }
}

pub fn entity(
    uid: EntityUid,
    attributes: HashMap<String, RestrictedExpression>,
    parents: HashSet<EntityUid>,
) -> Result<Entity, EntityError> {
    let name = uid.to_string();
    Entity::new(uid, attributes, parents).map_err(|error| EntityError(format!("{name}: {error}")))
}

fn uid(kind: &EntityTypeName, name: &str) -> EntityUid {
    EntityUid::from_type_name_and_id(kind.clone(), EntityId::new(name))
}
