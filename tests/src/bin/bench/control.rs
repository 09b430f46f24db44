pub fn run(_quick: bool) -> anyhow::Result<Vec<crate::compare::Comparison>> { todo!() }
