//! How the kernel crate is compiled: the one place that knows.
//!
//! Enters: where the workspace is, and where to build. Leaves: a cargo that is set up for it, or what to install. Never: a
//! guess at a tool chain that was not looked at. `authd/build.rs` includes this file too, so it uses nothing but std and
//! anyhow.

use std::{env, path::Path, process::Command};

use anyhow::{Result, bail};

/// What Rust calls little-endian BPF.
const TARGET: &str = "bpfel-unknown-none";
/// Where Debian's package `libstd-rust-web-dev-bpf` puts a prebuilt `core`.
const DEBIAN_CORE: &str = "/usr/lib/rustlib/bpfel-unknown-none/lib";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// bpf-linker loads LLVM from here when Debian's compiler brought it.
const DEBIAN_LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";

/// A compiler that can build for BPF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Toolchain {
    /// Debian's `rustc-web`, with a prebuilt `core`.
    Debian,
    /// rustup's nightly, which builds `core` from rust-src.
    Nightly,
}

impl Toolchain {
    /// Takes what is there; says what to install if nothing is.
    pub fn find() -> Result<Self> {
        if Path::new(DEBIAN_CORE).is_dir() && Path::new(DEBIAN_RUSTC).exists() {
            return Ok(Self::Debian);
        }
        if nightly_has_source() {
            return Ok(Self::Nightly);
        }
        bail!(
            "no compiler for {TARGET}: run `cargo xtask setup` (as root on Debian), or install Debian's packages \
             rustc-web and libstd-rust-web-dev-bpf, or rustup's nightly with its component rust-src"
        )
    }

    pub fn describe(&self) -> &'static str {
        match self {
            Self::Debian => "Debian's rustc-web with its prebuilt core",
            Self::Nightly => "rustup's nightly, building core from rust-src",
        }
    }
}

/// cargo with a sub-command, set up for the kernel crate. What it builds in release form lies in `bpfel-unknown-none/release`
/// below `target_dir`, which must not be one that a running cargo holds locked.
pub fn cargo(toolchain: &Toolchain, workspace: &Path, target_dir: &Path, subcommand: &str) -> Command {
    let mut command = Command::new("cargo");
    // A build script is run with the outer build's settings in its environment; they are not ours.
    for (name, _) in env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        let foreign = text.starts_with("CARGO_") && !text.starts_with("CARGO_HOME") && !text.starts_with("CARGO_NET");
        if foreign || matches!(text, "RUSTC" | "RUSTC_WRAPPER" | "RUSTC_WORKSPACE_WRAPPER" | "RUSTFLAGS" | "TARGET") {
            command.env_remove(&name);
        }
    }
    command.current_dir(workspace);
    match toolchain {
        Toolchain::Debian => {
            command.arg(subcommand).env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
            command.env("LD_LIBRARY_PATH", DEBIAN_LIBRARIES);
        }
        Toolchain::Nightly => {
            command.arg("+nightly").arg(subcommand).args(["-Z", "build-std=core"]);
            command.env_remove("RUSTUP_TOOLCHAIN");
        }
    }
    command
        .args(["--target", TARGET])
        .env("CARGO_TARGET_DIR", target_dir)
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            [
                "-Clinker=bpf-linker",
                "-Clink-arg=--btf",
                // Else LLVM makes each zeroing of a struct a call of a loop over its bytes, with a stack frame of its own.
                "-Clink-arg=--disable-expand-memcpy-in-order",
                "-Cdebuginfo=2",
                "-Ctarget-cpu=v3",
            ]
            .join("\u{1f}"),
        )
        // A workspace has one set of profiles for all its members; the kernel crate needs these.
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1");
    if env::var_os("CI").is_some() {
        command.arg("--locked");
    }
    command
}

fn nightly_has_source() -> bool {
    let output = Command::new("rustc").args(["+nightly", "--print", "sysroot"]).output();
    let Ok(output) = output else { return false };
    let sysroot = String::from_utf8_lossy(&output.stdout);
    output.status.success() && Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core").is_dir()
}
