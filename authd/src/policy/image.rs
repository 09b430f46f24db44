//! A generation's tables, before they are written to maps.

use std::collections::BTreeMap;

use authd_common::{
    address::Address,
    tables::{Cell, CellKey, PortEntry, WorkloadEntry},
};

#[derive(Clone, Debug, Default)]
pub struct Image {
    pub flags: u32,
    pub workloads: Vec<WorkloadEntry>,
    pub addresses: BTreeMap<(Address, u8), u32>,
    pub ports: BTreeMap<u32, PortEntry>,
    pub cells: BTreeMap<CellKey, Cell>,
}
