//! Builds the kernel object, so that `cargo build` alone gives a daemon that carries it.

#[path = "../xtask/src/ebpf.rs"]
mod ebpf;

use std::{env, path::PathBuf};

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let manifest = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let workspace = manifest.parent().context("the package lies in a workspace")?;
    for path in ["authd-ebpf/src", "authd-ebpf/Cargo.toml", "authd-common/src", "xtask/src/ebpf.rs"] {
        println!("cargo:rerun-if-changed={}", workspace.join(path).display());
    }
    let target_dir = PathBuf::from(env::var("OUT_DIR")?).join("ebpf");
    let object = ebpf::build(workspace, &target_dir)?;
    println!("cargo:rustc-env=AUTHD_EBPF_OBJECT={}", object.display());
    Ok(())
}
