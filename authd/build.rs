//! Builds the kernel object, so that `cargo build` alone gives a daemon that carries it.

#[path = "../xtask/src/ebpf.rs"]
mod ebpf;

use std::{env, path::PathBuf};

use anyhow::{Context, Result, bail};

fn main() -> Result<()> {
    let manifest = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let workspace = manifest.parent().context("the package lies in a workspace")?;
    for path in ["authd-ebpf/src", "authd-ebpf/Cargo.toml", "authd-common/src", "xtask/src/ebpf.rs"] {
        println!("cargo:rerun-if-changed={}", workspace.join(path).display());
    }
    let target_dir = PathBuf::from(env::var("OUT_DIR")?).join("ebpf");
    let toolchain = ebpf::Toolchain::find()?;
    let status = ebpf::cargo(&toolchain, workspace, &target_dir, "build")
        .args(["--release", "--package", "authd-ebpf"])
        .status()
        .context("starting cargo")?;
    if !status.success() {
        bail!("building authd-ebpf with {} failed: {status}", toolchain.describe());
    }
    let object = target_dir.join("bpfel-unknown-none/release/authd-ebpf");
    println!("cargo:rustc-env=AUTHD_EBPF_OBJECT={}", object.display());
    Ok(())
}
