//! Certificates for servers under test and their clients.

use std::path::{Path, PathBuf};
use std::{fs, io};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};

use crate::nest::Nest;
use crate::{Error, unique_name};

/// An authority that nobody else trusts, and whom it vouches for: a server at 127.0.0.1, and a client. All are files in PEM, which are removed
/// when this is dropped.
#[derive(Debug)]
pub struct Certificates {
    dir: PathBuf,
    /// The authority's certificate.
    pub authority: PathBuf,
    /// The server's.
    pub server: Identity,
    /// The client's.
    pub client: Identity,
}

/// A certificate and its key.
#[derive(Debug)]
pub struct Identity {
    /// The certificate.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

impl Certificates {
    /// Makes them, unlike all others.
    ///
    /// # Errors
    /// [`Error::Io`] when they cannot be made or written.
    pub fn make() -> Result<Certificates, Error> {
        let dir = Nest::get()?.place()?.dir;
        let mut params = CertificateParams::default();
        // Whoever knows another authority looks for its name.
        params.distinguished_name.push(DnType::CommonName, format!("authority {}", unique_name()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer =
            KeyPair::generate().and_then(|key| CertifiedIssuer::self_signed(params, key)).map_err(failed)?;
        Ok(Certificates {
            authority: write(&dir, "authority.pem", &issuer.pem())?,
            server: vouch(&issuer, ExtendedKeyUsagePurpose::ServerAuth, &dir, "server")?,
            client: vouch(&issuer, ExtendedKeyUsagePurpose::ClientAuth, &dir, "client")?,
            dir,
        })
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        // What is left goes with the process.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn vouch(
    issuer: &CertifiedIssuer<'_, KeyPair>,
    purpose: ExtendedKeyUsagePurpose,
    dir: &Path,
    name: &str,
) -> Result<Identity, Error> {
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).map_err(failed)?;
    params.extended_key_usages = vec![purpose];
    let certificate = params.signed_by(&key, issuer).map_err(failed)?;
    Ok(Identity {
        certificate: write(dir, &format!("{name}.pem"), &certificate.pem())?,
        key: write(dir, &format!("{name}.key"), &key.serialize_pem())?,
    })
}

fn write(dir: &Path, name: &str, text: &str) -> Result<PathBuf, Error> {
    let path = dir.join(name);
    fs::write(&path, text).map_err(Error::io(format!("write {}", path.display())))?;
    Ok(path)
}

fn failed(error: rcgen::Error) -> Error {
    Error::io("make a certificate")(io::Error::other(error))
}
