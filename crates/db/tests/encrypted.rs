//! Connections to a server that are encrypted, and who is not believed on either side.
#![allow(clippy::unwrap_used, reason = "also in the functions that tests share")]

mod support;

use db::mysql::Settings;
use db::{Db, Error, OpenError};
use servers::{Certificates, Database, MariaDb};
use support::{ITEMS, ids, insert};

fn connect(database: &Database, options: &str) -> Result<Db, OpenError> {
    Db::connect(Settings::new(format!("{}?{options}", database.url()), "test"), ITEMS)
}

/// What the connections are encrypted with, as the server says it; nothing if they are not.
async fn ciphers(db: &Db) -> [String; 2] {
    const ASK: &str = "SHOW SESSION STATUS LIKE 'Ssl_cipher'";
    let written = db.write(|tx| tx.query_opt(ASK, &[], |row| row.get(1))).await;
    let read = db.read(|tx| tx.query_opt(ASK, &[], |row| row.get(1))).await;
    [written, read].map(|cipher: Result<Option<String>, Error>| cipher.unwrap().unwrap())
}

#[tokio::test]
async fn both_sides_show_certificates_where_it_is_asked_for() {
    let Certificates { authority, server, client, .. } = &Certificates::make().unwrap();
    let mariadb = MariaDb::start_with(&[
        &format!("--ssl-cert={}", server.certificate.display()),
        &format!("--ssl-key={}", server.key.display()),
        &format!("--ssl-ca={}", authority.display()),
    ])
    .unwrap();
    let database = mariadb.database().unwrap();
    let private = format!("root_cert_path={}", authority.display());

    let db = connect(&database, &private).unwrap();
    insert(&db, 1).await.unwrap();
    let used = ciphers(&db).await;
    assert!(used.iter().all(|cipher| cipher.starts_with("TLS_")), "{used:?}");
    let plain = connect(&database, "").unwrap();
    assert_eq!((ciphers(&plain).await, ids(&plain).await), ([String::new(), String::new()], vec![1]));

    // The public authorities do not vouch for it, nor does another private one.
    let other = Certificates::make().unwrap();
    for options in ["tls=true".to_owned(), format!("root_cert_path={}", other.authority.display())] {
        let refused = connect(&database, &options).err().unwrap().to_string();
        assert!(refused.contains("UnknownIssuer") && refused.contains("the TLS options"), "{refused}");
    }

    // Who has to show a certificate and shows none is refused, encrypted or not.
    let (name, at) = (database.name(), mariadb.socket_addr());
    mariadb
        .address()
        .run(&format!(
            "CREATE USER known@'127.0.0.1' REQUIRE X509; GRANT ALL ON {name}.* TO known@'127.0.0.1'"
        ))
        .unwrap();
    let as_known = |options: &str| {
        Db::connect(Settings::new(format!("mysql://known@{at}/{name}?{options}"), "test"), ITEMS)
    };
    for options in ["", &private] {
        let refused = as_known(options).err().unwrap().to_string();
        assert!(refused.contains("Access denied"), "{refused}");
    }
    let (chain, key) = (client.certificate.display(), client.key.display());
    let known = as_known(&format!("{private}&cert_chain_path={chain}&priv_key_path={key}")).unwrap();
    assert_eq!(ids(&known).await, [1]);
}

/// Whoever is between could otherwise ask for the password in the clear, by saying that the server has no TLS.
#[tokio::test]
async fn a_server_without_tls_is_refused_where_it_is_asked_for() {
    let database = servers::shared::mariadb().database().unwrap();
    let refused = connect(&database, "tls=true").err().unwrap();
    assert!(refused.to_string().contains("Client requires secure connection"), "{refused}");
    assert_eq!(ciphers(&connect(&database, "tls=false").unwrap()).await, [String::new(), String::new()]);
}
