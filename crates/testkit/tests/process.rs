//! Starting what is no shop fails with its reason; waiting ends.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::time::Duration;

use testkit::{Options, Shop, StartFailed, TempDir, until};

fn script(dir: &TempDir, text: &str) -> Options {
    let path = dir.path().join("script");
    std::fs::write(&path, text).unwrap();
    // The wrapper becomes the script, whose first argument is then the shop's name.
    let wrapper = vec!["sh".to_owned(), path.to_str().unwrap().to_owned()];
    Options { wrapper, ..Options::new("saga", dir.path().join("data")) }
}

#[tokio::test]
async fn what_does_not_exist_cannot_be_started() {
    let dir = TempDir::new();
    let failed = Shop::start(Options::new("/nowhere/saga", dir.path())).await.unwrap_err();
    assert!(matches!(&failed, StartFailed::Spawn { program, .. } if program == "/nowhere/saga"), "{failed}");
}

#[tokio::test]
async fn what_ends_at_once_tells_how_and_why() {
    let dir = TempDir::new();
    let failed = Shop::start(script(&dir, "echo broken >&2; exit 3")).await.unwrap_err();
    assert!(
        matches!(&failed, StartFailed::Ended { status, stderr } if status.code() == Some(3) && stderr == "broken\n"),
        "{failed}"
    );
}

#[tokio::test]
async fn a_banner_without_an_address_is_none() {
    let dir = TempDir::new();
    let failed = Shop::start(script(&dir, "echo '  stop me'; exec sleep 100")).await.unwrap_err();
    assert!(matches!(&failed, StartFailed::Banner { line: "shop API", .. }), "{failed}");
}

#[tokio::test]
async fn a_folder_is_gone_with_its_owner() {
    let dir = TempDir::new();
    let path = dir.path().to_owned();
    std::fs::write(path.join("file"), "").unwrap();
    drop(dir);
    assert!(!path.exists());
}

#[tokio::test(start_paused = true)]
async fn waiting_ends_when_the_condition_holds() {
    let mut looks = 0;
    until("three looks", Duration::from_secs(1), async || {
        looks += 1;
        looks == 3
    })
    .await;
    assert_eq!(looks, 3);
}

#[tokio::test(start_paused = true)]
#[should_panic(expected = "not within 1s: never")]
async fn waiting_ends_when_the_limit_is_over() {
    until("never", Duration::from_secs(1), async || false).await;
}

#[tokio::test(start_paused = true)]
#[should_panic(expected = "not within 1s: hangs")]
async fn waiting_ends_when_the_condition_hangs() {
    until("hangs", Duration::from_secs(1), async || std::future::pending().await).await;
}
