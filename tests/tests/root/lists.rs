//! Revocation lists of issuers that are replaced while grants live.

use std::{fs, net::IpAddr, sync::Arc};

use anyhow::{Context, Result, ensure};
use authd_tests::{
    probe::Running,
    trust::{Authority, serial_of},
};
use libtest_mimic::Trial;
use rustls::{ClientConfig, crypto::aws_lc_rs::default_provider, version::TLS13};

use crate::{
    Verdict,
    peers::{ASK, PARTNER, POLICY, Scene},
    reload::wait_until,
    trial,
};

pub fn trials() -> Vec<Trial> {
    vec![trial("a_new_list_of_the_issuer_ends_what_rests_on_it", a_new_list_ends_what_rests_on_it)]
}

/// Somebody with a certificate and a grant at an address, and a connection that rests on it.
struct Holder {
    address: IpAddr,
    config: Arc<ClientConfig>,
    serial: Vec<u8>,
    held: Running,
}

impl Holder {
    fn new(scene: &Scene, authority: &Authority, address: &str) -> Result<Self> {
        let address: IpAddr = address.parse()?;
        let (config, leaf) = scene.client_of(authority, default_provider(), &TLS13, PARTNER)?;
        let config = Arc::new(config);
        let answer = ask(scene, address, &config)?;
        ensure!(answer.starts_with("HTTP/1.1 201"), "{answer}");
        let from = format!("{address}:0");
        let held =
            scene.sandbox.spawn_in("/elsewhere", &scene.far, &["hold-tcp", "192.0.2.1:7001", "--from", &from])?;
        Ok(Self { address, config, serial: serial_of(&leaf)?, held })
    }

    /// The answer to another request for a grant.
    fn asks(&self, scene: &Scene) -> Result<String> {
        ask(scene, self.address, &self.config)
    }

    fn goes_on(&mut self) -> Result<bool> {
        Ok(self.held.again()?.ok)
    }
}

fn ask(scene: &Scene, from: IpAddr, config: &Arc<ClientConfig>) -> Result<String> {
    Ok(Scene::request_on(scene.connect_from(from)?, config, "node.example.org", ASK)?.0)
}

fn a_new_list_ends_what_rests_on_it() -> Result<Verdict> {
    let scene = Scene::new("")?;
    let directory = scene.sandbox.policy_directory();
    // As careful tools do.
    let publish = |list: &str| -> Result<()> {
        fs::write(directory.join(".partners.crl.new"), list)?;
        Ok(fs::rename(directory.join(".partners.crl.new"), directory.join("partners.crl"))?)
    };
    publish(&scene.authority.list(&[])?)?;
    let bundle = "bundle = \"partners.crt\"\n";
    ensure!(POLICY.contains(bundle));
    let with_list = format!("{bundle}crl_files = [\"partners.crl\"]\n");
    scene.sandbox.write_policy(&POLICY.replace(bundle, &with_list))?;
    scene.daemon.must_apply()?;
    let ended = || -> Result<Vec<_>> {
        Ok(scene.daemon.records()?.into_iter().filter(|record| record.event.starts_with("grant_rev")).collect())
    };

    let mut one = Holder::new(&scene, &scene.authority, "192.0.2.2")?;
    let mut two = Holder::new(&scene, &scene.authority, "192.0.2.3")?;
    let both = [one.serial.clone(), two.serial.clone()];
    // With which somebody asks from time to time, to see what is in force.
    let another = Arc::new(scene.client_as(default_provider(), &TLS13, PARTNER)?.0);
    // Of somebody who has the issuer's name and not its key; and of nobody.
    let forged = Authority::new("tests")?.list(&both)?;
    for (list, reason) in [(forged.as_str(), "bad_crl"), ("-----BEGIN X509 CRL-----\nAAAA", "unknown_issuer")] {
        publish(list)?;
        wait_until(reason, || Ok(ask(&scene, two.address, &another)?.contains(reason)))?;
        ensure!(one.goes_on()? && two.goes_on()? && ended()?.is_empty(), "{reason}\n{}", scene.daemon.log());
    }

    publish(&scene.authority.list(&both[..1])?)?;
    wait_until("the end of one", || Ok(!one.goes_on()?)).with_context(|| scene.daemon.log())?;
    let record = scene.daemon.wait_for("its end", |r| r.event == "grant_revoked")?;
    ensure!(record.reason.as_deref() == Some("certificate_revoked"), "{record:?}");
    ensure!(record.remote_address == Some(one.address) && record.proofs[0].serial.is_some(), "{record:?}");
    ensure!(one.asks(&scene)?.contains("certificate_revoked"));
    let metrics = String::from_utf8(scene.daemon.command(&["status", "--prometheus"])?.stdout)?;
    ensure!(metrics.contains("\nauthd_revocation_seconds_count 1\n"), "{metrics}");
    ensure!(two.goes_on()? && ended()?.len() == 1, "{:?}", ended()?);
    ensure!(two.asks(&scene)?.starts_with("HTTP/1.1 201"));

    // A CA of the chain.
    let below = scene.authority.below("below")?;
    let mut three = Holder::new(&scene, &below, "192.0.2.2")?;
    ensure!(three.goes_on()?);
    publish(&scene.authority.list(&[one.serial.clone(), below.serial()?])?)?;
    wait_until("the end of three", || Ok(!three.goes_on()?)).with_context(|| scene.daemon.log())?;
    wait_until("its record", || Ok(ended()?.len() >= 2))?;
    ensure!(two.goes_on()? && ended()?.len() == 2, "{:?}", ended()?);
    // Nothing of it is a revocation of this node's: the next list may say otherwise.
    publish(&scene.authority.list(&[])?)?;
    wait_until("the next list", || Ok(one.asks(&scene)?.starts_with("HTTP/1.1 201")))?;
    Ok(Verdict::Ran)
}
