//! Messages that come again, in another order, and that nobody understands: rows 4 and 8 of the list of faults, on the broker as it is.

use bus::{Envelope, EnvelopeId, Subject};
use saga::{Mode, Path, Phase, StepIndex, Token};
use serde_json::Value;
use shop::purchase::{
    INVENTORY_COMMANDS, ORCHESTRATOR, ORDER_COMMANDS, PAYMENT_COMMANDS, PURCHASE_PROGRESS, PURCHASE_SAGA,
};
use testkit::{Engines, Ordeal, Shop, TempDir, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use wire::messages::{About, Carried, Command, Progress, Start, ToOrchestrator, ToParticipant};

use super::tap::{MADE_UP, Repeated, Repeater, SUBJECTS, Tap};
use super::{CROWD, SOON, much_is_bought, options, turn};

/// Purchases that make an act.
const MUCH: usize = 50;
/// A saga that nobody has begun.
const NO_SAGA: u64 = 999;

/// What no part of the shop can understand, each for a queue, with what its dead letter must say.
fn nonsense() -> Vec<(Subject, Vec<u8>, &'static str)> {
    let of_next_version = || Carried {
        token: Token { saga: NO_SAGA, mode: Mode::Execute, path: Path::new() },
        about: About::new(PURCHASE_SAGA, 99, 1, b"", b""),
    };
    let start = ToOrchestrator::Start(Start { carried: of_next_version() }).encode();
    let progress = Progress { carried: of_next_version() }.encode();
    let unknown = "no definition \"purchase\" version 99";
    let mut all =
        vec![(ORCHESTRATOR, start.to_vec(), unknown), (PURCHASE_PROGRESS, progress.to_vec(), unknown)];
    for (index, subject) in (0..).zip([INVENTORY_COMMANDS, ORDER_COMMANDS, PAYMENT_COMMANDS]) {
        let about = About::new(PURCHASE_SAGA, 1, 1, b"\xff\xff", b"");
        let carried = Carried { about, ..of_next_version() };
        let command = Command { carried, step: StepIndex(index), phase: Phase::Action };
        let command = ToParticipant::Command(command).encode().to_vec();
        // A message begins with its format.
        let of_next_format = [&[command[0], 99], &command[2..]].concat();
        all.push((subject, of_next_format, "format 99"));
        all.push((subject, command, "the input of the saga cannot be read"));
    }
    for subject in SUBJECTS {
        all.push((subject, b"\xff\xfe\xfd".to_vec(), "not a "));
        all.push((subject, Vec::new(), "format 0"));
    }
    all
}

/// Row 4: whatever comes by is repeated and shuffled, while much is bought.
async fn messages_are_repeated_and_shuffled(engines: &Engines, ordeal: &mut Ordeal) {
    let repeater = Repeater::begin(engines, ordeal.dice()).await;
    much_is_bought(ordeal, MUCH).await;
    let repeated = repeater.end().await;
    for (subject, Repeated { messages, copies }) in SUBJECTS.iter().zip(&repeated) {
        println!("{subject}: {messages} messages were made {copies}");
    }
    // An orchestrator is told nothing, unless something is taken up again.
    assert!(repeated[1..].iter().all(|queue| queue.copies > queue.messages), "{repeated:?}");
}

/// Row 8: what cannot be understood is put between what can, in one frame with what comes by.
async fn nonsense_is_told(engines: &Engines) {
    for subject in SUBJECTS {
        let of_subject = (0..).zip(nonsense()).filter(|(_, (of, ..))| *of == subject);
        let made_up = of_subject.map(|(number, (_, body, _))| Envelope {
            id: EnvelopeId::of(number, MADE_UP),
            body: body.into(),
        });
        let mut tap = Tap::on(engines, subject).await;
        // Nobody tells an orchestrator anything, unless something is taken up again.
        let mut frame = if subject == ORCHESTRATOR { Vec::new() } else { tap.take().await };
        frame.extend(made_up);
        tap.put(frame).await;
        tap.close().await;
    }
    no_frame_is_sent(engines).await;
}

/// As any program may that has the broker's address: not even a frame. It begins with the version of one: another would be waited with.
async fn no_frame_is_sent(engines: &Engines) {
    let server = engines.nats().split(',').next().unwrap().trim_start_matches("nats://");
    let mut stream = TcpStream::connect(server).await.unwrap();
    let subject = format!("{}.{INVENTORY_COMMANDS}", engines.name());
    let text = format!("CONNECT {{\"verbose\":false}}\r\nPUB {subject} 6\r\n\u{1}hello\r\nPING\r\n");
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answered = Vec::new();
    while !answered.ends_with(b"PONG\r\n") {
        let length = stream.read_buf(&mut answered).await.unwrap();
        assert!(length > 0, "{}", String::from_utf8_lossy(&answered));
    }
}

/// The shop's dead letters, as its operator sees them.
async fn letters(shop: &Shop) -> Vec<Value> {
    let replicas = shop.replicas().await;
    let one = replicas.iter().find(|replica| replica.service == "orchestrator").unwrap();
    let answer = one.admin().get("/bus/parked", None).await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json().as_array().unwrap().clone()
}

/// Each of what was told has become a dead letter, for its reason, and nothing else has.
async fn nonsense_is_set_aside(shop: &Shop) {
    let told = nonsense();
    until("all of it is set aside", SOON, async || letters(shop).await.len() > told.len()).await;
    let letters = letters(shop).await;
    for (number, (subject, _, reason)) in (0..).zip(&told) {
        let id = EnvelopeId::of(number, MADE_UP).to_string();
        let letter = letters.iter().find(|letter| letter["id"] == id).unwrap_or_else(|| panic!("no {id}"));
        assert_eq!(letter["subject"], subject.0, "{letter}");
        assert!(
            letter["reason"].as_str().unwrap().contains(reason),
            "{letter} where {reason:?} was expected"
        );
    }
    let no_frame = |letter: &&Value| letter["reason"].as_str().unwrap().contains("is no frame");
    assert_eq!(letters.iter().filter(no_frame).count(), 1, "{letters:?}");
    assert_eq!(letters.len(), told.len() + 1, "{letters:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_becomes_of_messages_on_their_way_changes_nothing() {
    let _turn = turn().await;
    let (dir, engines) = (TempDir::new(), Engines::shared());
    let mut ordeal = Ordeal::begin("messages", options(&dir, &engines), CROWD).await;
    let shop = ordeal.open().await;

    messages_are_repeated_and_shuffled(&engines, &mut ordeal).await;
    much_is_bought(&ordeal, MUCH).await;
    ordeal.reckon(&shop, "row 4: repeated and shuffled").await;
    assert_eq!(letters(&shop).await, [] as [Value; 0]);

    nonsense_is_told(&engines).await;
    much_is_bought(&ordeal, MUCH).await;
    ordeal.reckon(&shop, "row 8: nonsense").await;
    nonsense_is_set_aside(&shop).await;

    let totals = ordeal.end_in(shop).await;
    assert!(totals.succeeded > 0 && totals.failed > 0, "{totals:?}");
}
