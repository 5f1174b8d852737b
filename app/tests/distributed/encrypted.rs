//! Servers that are reached by TLS only, of which the settings name the files.

use servers::{Certificates, MariaDb, MySqlAddress, Nats};
use testkit::{Engines, Shop, TempDir};

use super::{options, tour};

#[tokio::test(flavor = "multi_thread")]
async fn a_shop_shows_its_certificates_and_believes_an_authority_of_its_own() {
    let (dir, certificates) = (TempDir::new(), Certificates::make().unwrap());
    let Certificates { authority, server, client, .. } = &certificates;
    let mariadb = MariaDb::start_with(&[
        &format!("--ssl-cert={}", server.certificate.display()),
        &format!("--ssl-key={}", server.key.display()),
    ])
    .unwrap();
    let nats = Nats::start_with(
        1,
        &format!(
            "tls {{ cert_file: {:?}, key_file: {:?}, ca_file: {authority:?}, verify: true }}",
            server.certificate, server.key
        ),
    )
    .unwrap();
    let mysql = format!("{}?root_cert_path={}", mariadb.url(), authority.display());
    let engines = Engines::new(MySqlAddress::parse(&mysql).unwrap(), &nats.urls(), None);
    let path = |path: &std::path::Path| path.display().to_string();
    let options = options(&dir, &engines, 0)
        .env("SAGA_NATS__ROOT_CERTIFICATES", path(authority))
        .env("SAGA_NATS__CLIENT_CERTIFICATE", path(&client.certificate))
        .env("SAGA_NATS__CLIENT_KEY", path(&client.key));
    let shop = Shop::start(options).await.unwrap();
    tour::tour(&shop, &engines).await;
}
