//! From a cgroup's path to a workload.
//!
//! A pattern is a path whose components may contain `*`. The longest pattern that matches a path or one of its ancestors
//! decides; of two equally long, the one with more literal characters.

use std::collections::{HashMap, HashSet};

use authd_common::{identity::MAX_DEPTH, tables::UNMANAGED};

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PatternError {
    #[error("a cgroup path begins with `/`")]
    Relative,
    #[error("an empty, `.` or `..` component")]
    Component,
    #[error("`**`: a pattern has to say how deep it reaches; use one `*` per level")]
    DoubleStar,
    #[error("more than {} components", MAX_DEPTH - 1)]
    Depth,
    #[error("the root itself would make every process of the node a workload")]
    Root,
}

/// One cgroup pattern.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Pattern {
    components: Vec<String>,
}

impl Pattern {
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        let rest = text.strip_prefix('/').ok_or(PatternError::Relative)?;
        if rest.is_empty() {
            return Err(PatternError::Root);
        }
        let components: Vec<String> = rest.split('/').map(str::to_owned).collect();
        if components.len() >= MAX_DEPTH as usize {
            return Err(PatternError::Depth);
        }
        for component in &components {
            if component.is_empty() || component == "." || component == ".." {
                return Err(PatternError::Component);
            }
            if component.contains("**") {
                return Err(PatternError::DoubleStar);
            }
        }
        Ok(Self { components })
    }

    pub fn has_wildcard(&self) -> bool {
        self.components.iter().any(|c| c.contains('*'))
    }

    /// Of two patterns that match a cgroup, the greater one decides: components, then literal characters.
    pub fn specificity(&self) -> (usize, usize) {
        (self.components.len(), self.literals())
    }

    /// Whether some path matches both.
    pub fn intersects(&self, other: &Self) -> bool {
        self.components.len() == other.components.len()
            && self.components.iter().zip(&other.components).all(|(a, b)| globs_intersect(a, b))
    }

    fn literals(&self) -> usize {
        self.components.iter().map(|c| c.chars().filter(|c| *c != '*').count()).sum()
    }
}

/// Whose a path is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Classified {
    /// A workload's number, or `UNMANAGED`.
    pub workload: u32,
    /// Some pattern could match strictly below.
    pub open: bool,
}

/// All patterns of a policy, as a tree by component: classifying a path does not slow down with their number, as long as
/// they are literal.
#[derive(Clone, Debug, Default)]
pub struct Patterns {
    nodes: Vec<Node>,
    /// Workloads whose grants go by instance.
    by_instance: HashSet<u32>,
}

#[derive(Clone, Debug, Default)]
struct Node {
    literal: HashMap<String, usize>,
    globs: Vec<(String, usize)>,
    /// The workload whose pattern ends here, and how many literal characters the pattern has.
    workload: Option<(u32, usize)>,
}

impl Patterns {
    pub fn new<'a>(patterns: impl Iterator<Item = (u32, &'a Pattern)>) -> Self {
        let mut nodes = vec![Node::default()];
        for (workload, pattern) in patterns {
            let mut at = 0;
            for component in &pattern.components {
                let existing = if component.contains('*') {
                    nodes[at].globs.iter().find(|(glob, _)| glob == component).map(|(_, next)| *next)
                } else {
                    nodes[at].literal.get(component).copied()
                };
                at = existing.unwrap_or_else(|| {
                    let next = nodes.len();
                    nodes.push(Node::default());
                    if component.contains('*') {
                        nodes[at].globs.push((component.clone(), next));
                    } else {
                        nodes[at].literal.insert(component.clone(), next);
                    }
                    next
                });
            }
            nodes[at].workload = Some((workload, pattern.literals()));
        }
        Self { nodes, by_instance: HashSet::new() }
    }

    /// Says whose grants go by instance.
    pub fn with_instances(self, workloads: impl Iterator<Item = u32>) -> Self {
        Self { by_instance: workloads.collect(), ..self }
    }

    /// How much of a path is the instance's own, if its workload's grants go by instance.
    pub fn instance_end(&self, path: &str) -> Option<usize> {
        let own = self.by_instance.contains(&self.classify(path).workload);
        own.then(|| self.instance_path(path)).flatten().map(str::len)
    }

    /// Whose a path below the enforced root is. `/` is the root.
    pub fn classify(&self, path: &str) -> Classified {
        let mut reached = if self.nodes.is_empty() { Vec::new() } else { vec![0] };
        let mut workload = UNMANAGED;
        for component in path.split('/').filter(|c| !c.is_empty()) {
            let mut next = Vec::new();
            for &at in &reached {
                let node = &self.nodes[at];
                next.extend(node.literal.get(component).copied());
                next.extend(node.globs.iter().filter(|(glob, _)| matches(glob, component)).map(|(_, to)| *to));
            }
            reached = next;
            let best = reached.iter().filter_map(|&at| self.nodes[at].workload).max_by_key(|(_, literals)| *literals);
            if let Some((matched, _)) = best {
                workload = matched;
            }
            if reached.is_empty() {
                break;
            }
        }
        let open = reached.iter().any(|&at| !self.nodes[at].literal.is_empty() || !self.nodes[at].globs.is_empty());
        Classified { workload, open }
    }

    /// The part of a path that the deciding pattern matched: the instance's own cgroup.
    pub fn instance_path<'a>(&self, path: &'a str) -> Option<&'a str> {
        let target = self.classify(path).workload;
        if target == UNMANAGED {
            return None;
        }
        let mut ends: Vec<usize> = path.match_indices('/').map(|(at, _)| at).skip(1).collect();
        ends.push(path.len());
        ends.into_iter().map(|end| &path[..end]).find(|prefix| self.classify(prefix).workload == target)
    }
}

/// Whether a component matches a glob of literal parts and `*`.
fn matches(glob: &str, text: &str) -> bool {
    let mut parts = glob.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// Whether some text matches both globs.
fn globs_intersect(a: &str, b: &str) -> bool {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    // possible[i][j]: what is left of both from i and j on can match one text.
    let mut possible = vec![vec![false; b.len() + 1]; a.len() + 1];
    for i in (0..=a.len()).rev() {
        for j in (0..=b.len()).rev() {
            let (x, y) = (a.get(i), b.get(j));
            possible[i][j] = match (x, y) {
                (None, None) => true,
                (Some('*'), _) => possible[i + 1][j] || (y.is_some() && possible[i][j + 1]),
                (_, Some('*')) => possible[i][j + 1] || (x.is_some() && possible[i + 1][j]),
                (Some(x), Some(y)) => x == y && possible[i + 1][j + 1],
                _ => false,
            };
        }
    }
    possible[0][0]
}

/// The name of an instance, from its cgroup's last component: without a unit's suffix, and only with characters that a
/// SPIFFE path segment may have (SPIFFE-ID, 2.2).
pub fn instance_name(path: &str) -> String {
    let last = path.rsplit('/').next().unwrap_or_default();
    let stem = [".service", ".scope", ".slice"].iter().find_map(|s| last.strip_suffix(s)).unwrap_or(last);
    stem.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(list: &[(u32, &str)]) -> Patterns {
        let parsed: Vec<(u32, Pattern)> = list.iter().map(|(n, p)| (*n, Pattern::parse(p).unwrap())).collect();
        Patterns::new(parsed.iter().map(|(n, p)| (*n, p)))
    }

    #[test]
    fn children_belong_to_their_ancestor_unless_a_longer_pattern_matches() {
        let p = patterns(&[(1, "/a/b"), (2, "/a/b/c")]);
        assert_eq!(p.classify("/a/b").workload, 1);
        assert_eq!(p.classify("/a/b/x/y").workload, 1);
        assert_eq!(p.classify("/a/b/c/d").workload, 2);
        assert_eq!(p.classify("/a").workload, UNMANAGED);
    }

    #[test]
    fn the_more_literal_of_two_equally_long_patterns_wins() {
        let p = patterns(&[(1, "/s/pay-*"), (2, "/s/pay-api-*")]);
        assert_eq!(p.classify("/s/pay-api-7").workload, 2);
        assert_eq!(p.classify("/s/pay-7").workload, 1);
    }

    #[test]
    fn open_means_that_something_could_match_below() {
        let p = patterns(&[(1, "/agents/*/run"), (2, "/db")]);
        assert!(p.classify("/").open);
        assert!(p.classify("/agents").open);
        assert!(p.classify("/agents/x").open);
        assert!(!p.classify("/agents/x/run").open);
        assert!(!p.classify("/db").open);
        assert!(!p.classify("/other").open);
    }

    #[test]
    fn a_star_does_not_cross_a_slash() {
        let p = patterns(&[(1, "/a/*.scope")]);
        assert_eq!(p.classify("/a/x.scope").workload, 1);
        assert_eq!(p.classify("/a/x/y.scope").workload, UNMANAGED);
        assert_eq!(p.classify("/a/x.scope.d").workload, UNMANAGED);
    }

    #[test]
    fn instances_have_names_that_spiffe_allows() {
        let p = patterns(&[(1, "/agents/support-*.scope")]);
        assert_eq!(p.instance_path("/agents/support-7.scope/child"), Some("/agents/support-7.scope"));
        assert_eq!(instance_name("/agents/support-7.scope"), "support-7");
        assert_eq!(instance_name("/x/run-r1@2:3.service"), "run-r1-2-3");
    }

    #[test]
    fn patterns_that_share_a_path_are_found() {
        let meets = |a: &str, b: &str| Pattern::parse(a).unwrap().intersects(&Pattern::parse(b).unwrap());
        assert!(meets("/a/x*", "/a/*y"));
        assert!(meets("/a/*b*", "/a/c*"));
        assert!(!meets("/a/x*", "/a/y*"));
        assert!(!meets("/a/x*", "/a/x*/b"));
        assert!(!meets("/a/*.scope", "/a/*.service"));
    }

    #[test]
    fn patterns_that_cannot_be_meant_are_refused() {
        assert_eq!(Pattern::parse("a/b"), Err(PatternError::Relative));
        assert_eq!(Pattern::parse("/"), Err(PatternError::Root));
        assert_eq!(Pattern::parse("/a/**"), Err(PatternError::DoubleStar));
        assert_eq!(Pattern::parse("/a//b"), Err(PatternError::Component));
        assert_eq!(Pattern::parse(&"/a".repeat(12)), Err(PatternError::Depth));
    }
}
