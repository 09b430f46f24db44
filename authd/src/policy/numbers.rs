//! Numbers of workloads and rules: tables, tags and events carry numbers, people read names.
//!
//! A name keeps its number across generations and restarts, so that what a socket remembers stays true. A number is given
//! to another name only when its own has been out of the policy for many generations.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

/// Names in order of their numbers, from 1.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct Numbers {
    names: Vec<String>,
    /// For each name, how many generations ago it was last in the policy.
    absent: Vec<u32>,
    #[serde(skip)]
    index: HashMap<String, u32>,
}

/// Generations after which the number of a name that is gone may be given to another one. Sockets and records that are
/// older are decided anew anyway.
const REUSE_AFTER: u32 = 64;

impl Numbers {
    /// Gives each name its number: the one that it had, or a new one.
    pub fn assign<'a>(&mut self, names: impl Iterator<Item = &'a str>) {
        if self.index.len() != self.names.len() {
            self.index = self.names.iter().enumerate().map(|(i, name)| (name.clone(), i as u32 + 1)).collect();
        }
        self.absent.resize(self.names.len(), 0);
        self.absent.iter_mut().for_each(|age| *age = age.saturating_add(1));
        let mut new = Vec::new();
        for name in names {
            match self.index.get(name) {
                Some(&number) => self.absent[number as usize - 1] = 0,
                None => new.push(name.to_owned()),
            }
        }
        let mut free = (0..self.names.len()).filter(|&i| self.absent[i] > REUSE_AFTER).collect::<Vec<_>>().into_iter();
        for name in new {
            let at = match free.next() {
                Some(at) => {
                    self.index.remove(&self.names[at]);
                    self.names[at] = name.clone();
                    self.absent[at] = 0;
                    at
                }
                None => {
                    self.names.push(name.clone());
                    self.absent.push(0);
                    self.names.len() - 1
                }
            };
            self.index.insert(name, at as u32 + 1);
        }
    }

    pub fn number(&self, name: &str) -> Option<u32> {
        self.index.get(name).copied()
    }

    pub fn name(&self, number: u32) -> Option<&str> {
        self.names.get((number as usize).checked_sub(1)?).map(String::as_str)
    }

    /// One more than the highest number.
    pub fn end(&self) -> usize {
        self.names.len() + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_number_while_others_come_and_go() {
        let mut numbers = Numbers::default();
        numbers.assign(["a", "b"].into_iter());
        numbers.assign(["c", "b"].into_iter());
        assert_eq!((numbers.number("b"), numbers.number("c")), (Some(2), Some(3)));
        assert_eq!(numbers.name(1), Some("a"), "records of the last generation still name it");
    }

    #[test]
    fn a_number_is_used_again_only_after_many_generations() {
        let mut numbers = Numbers::default();
        numbers.assign(["a"].into_iter());
        for _ in 0..REUSE_AFTER {
            numbers.assign(std::iter::empty());
        }
        numbers.assign(["b"].into_iter());
        assert_eq!(numbers.number("b"), Some(1));
        assert_eq!(numbers.number("a"), None);
    }

    #[test]
    fn numbers_survive_being_written_down() {
        let mut numbers = Numbers::default();
        numbers.assign(["a", "b"].into_iter());
        let text = serde_json::to_string(&numbers).unwrap();
        let mut again: Numbers = serde_json::from_str(&text).unwrap();
        again.assign(["b"].into_iter());
        assert_eq!(again.number("b"), Some(2));
    }
}
