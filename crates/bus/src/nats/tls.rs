//! The files that a protected connection needs.
//!
//! They are read before a server is asked. The library reads them with each connection, so a certificate may be renewed while the bus is in
//! use; but it would not say which of them is wrong, and what it says looks like a server that is away.

use std::path::Path;

use async_nats::rustls::RootCertStore;
use async_nats::rustls::crypto::aws_lc_rs;
use async_nats::rustls::pki_types::pem::PemObject;
use async_nats::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use async_nats::rustls::sign::CertifiedKey;

use super::{Identity, StartError, Tls};

impl Tls {
    /// Refuses files that cannot be read, or are not what they should be.
    pub(super) async fn check(&self) -> Result<(), StartError> {
        if let Some(path) = &self.authorities {
            let bad = |why| bad("tls.authorities", path, why);
            let mut store = RootCertStore::empty();
            for certificate in certificates(path).await.map_err(bad)? {
                store.add(certificate).map_err(|error| bad(error.to_string()))?;
            }
        }
        let Some(Identity { certificate, key }) = &self.identity else { return Ok(()) };
        let chain = certificates(certificate)
            .await
            .map_err(|why| bad("tls.identity.certificate", certificate, why))?;
        let bad = |why| bad("tls.identity.key", key, why);
        let text = tokio::fs::read(key).await.map_err(|error| bad(error.to_string()))?;
        let secret =
            PrivateKeyDer::from_pem_slice(&text).map_err(|error| bad(format!("it holds no key: {error}")))?;
        let ours = CertifiedKey::from_der(chain, secret, &aws_lc_rs::default_provider());
        ours.map(drop).map_err(|error| {
            bad(format!("it is not the key of the certificate in {}: {error}", certificate.display()))
        })
    }
}

/// All certificates of a file, one at least.
async fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let text = tokio::fs::read(path).await.map_err(|error| error.to_string())?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if found.is_empty() => Err("it holds no certificate in PEM".to_owned()),
        Ok(found) => Ok(found),
        Err(error) => Err(format!("it holds no certificate in PEM: {error}")),
    }
}

fn bad(setting: &'static str, path: &Path, why: String) -> StartError {
    StartError::BadSetting { setting, value: path.display().to_string(), why }
}
