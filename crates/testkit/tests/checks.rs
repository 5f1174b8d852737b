//! The checker is worth what it finds: a good data directory is broken in every way that it claims to notice, one way at a
//! time, and each violation is named with the ids at fault, and no other.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::path::Path;

use rusqlite::{Connection, params};
use saga::{End, Entry, Outcome, Reason, StepIndex};
use shop::purchase::{Purchase, PurchasedItem};
use testkit::TempDir;
use testkit::checks::{Database, Effect, Expected, Report, Violation, check};
use wire::messages::{Recorded, encode_path};

use Database::*;

/// The customer, the product, the stock that it was created with.
const ANN: u64 = 7;
const LAMP: u64 = 501;
const LAMPS: i64 = 10;

/// A purchase that succeeded, one that was declined at its payment, one that was out of stock, one that was cancelled.
const PAID: u64 = 9001;
const DECLINED: u64 = 9002;
const SOLD_OUT: u64 = 9003;
const CANCELLED: u64 = 9004;
/// One that is under way: its stock is reserved.
const OPEN: u64 = 9005;

const DECLINE: &str = "declined";
const OUT_OF_STOCK: &str = "out of stock";

struct Shop {
    dir: TempDir,
    expected: Expected,
}

impl Shop {
    fn good() -> Shop {
        let shop = Shop { dir: TempDir::new(), expected: Expected::default() };
        for (database, migrations) in [
            (Account, account::MIGRATIONS),
            (Product, product::MIGRATIONS),
            (Order, order::MIGRATIONS),
            (Payment, payment::MIGRATIONS),
            (Database::Purchase, purchase::MIGRATIONS),
        ] {
            let conn = shop.open(database);
            for migration in migrations {
                conn.execute_batch(migration.sqlite).unwrap();
            }
        }
        // The checker reads what the view says. Here a table says it, so that it can say what the tables behind the view
        // could not.
        shop.sql(
            Database::Purchase,
            "DROP VIEW purchase;
             CREATE TABLE purchase (id, customer_id, idempotency_key, state, input, trace, created_at, deadline_at,
                                    next_wake_at, tries, finished_at, finished_no, reason, path)",
        );
        shop.fill()
    }

    fn fill(mut self) -> Shop {
        self.sql(
            Account,
            "INSERT INTO customer VALUES (7, 'Ann', 'Lee', 'a@b', 'a@b', 'x', '1', '1', 'hash', 1, 0)",
        );
        // 10 lamps: 2 sold to PAID, 1 held by OPEN.
        self.sql(Product, "INSERT INTO product VALUES (501, 'lamp', '', '', 30, 7, 0)");

        self.reply(PAID, 0, &done(11));
        self.reply(PAID, 1, &done(12));
        self.reply(PAID, 2, &done(13));
        self.purchase(PAID, 2, 1, Some(1), None, &[(0, done(11)), (1, done(12)), (2, done(13))]);
        self.order(PAID, 2);
        self.payment(PAID, 60);

        let refused = rejected(DECLINE, 23);
        self.reply(DECLINED, 0, &done(21));
        self.reply(DECLINED, 1, &done(22));
        self.reply(DECLINED, 2, &refused);
        self.reply(DECLINED, 1, &compensated(24));
        self.reply(DECLINED, 0, &compensated(25));
        let path = [(0, done(21)), (1, done(22)), (2, refused), (1, compensated(24)), (0, compensated(25))];
        self.purchase(DECLINED, 3, 2, Some(2), Some(DECLINE), &path);

        let refused = rejected(OUT_OF_STOCK, 31);
        self.reply(SOLD_OUT, 0, &refused);
        self.purchase(SOLD_OUT, 99, 2, Some(3), Some(OUT_OF_STOCK), &[(0, refused)]);

        // Cancelled between its first and its second step.
        self.reply(CANCELLED, 0, &done(41));
        self.reply(CANCELLED, 2, &tombstone(42));
        self.reply(CANCELLED, 1, &tombstone(43));
        self.reply(CANCELLED, 0, &compensated(44));
        let path = [(0, done(41)), (1, tombstone(43)), (0, compensated(44))];
        self.purchase(CANCELLED, 1, 3, Some(4), Some("the deadline passed"), &path);

        self.reply(OPEN, 0, &done(51));
        self.purchase(OPEN, 1, 0, None, None, &[]);

        self.sql(Database::Purchase, "UPDATE purchase_finish SET no = 4");
        self.expected = Expected {
            stock: [(LAMP, LAMPS)].into(),
            acknowledged: [PAID, DECLINED, SOLD_OUT, CANCELLED, OPEN].into(),
            keys: [("k9001".to_owned(), PAID), ("k9005".to_owned(), OPEN)].into(),
            parked: [].into(),
            may_be_open: true,
        };
        self
    }

    fn open(&self, database: Database) -> Connection {
        let conn = Connection::open(self.dir.path().join(database.name()).with_extension("db")).unwrap();
        conn.execute_batch("PRAGMA synchronous = OFF").unwrap();
        conn
    }

    /// Runs statements past every constraint that the schema has.
    fn sql(&self, database: Database, statements: &str) {
        let conn = self.open(database);
        conn.execute_batch("PRAGMA ignore_check_constraints = ON; PRAGMA foreign_keys = OFF").unwrap();
        conn.execute_batch(statements).unwrap();
    }

    fn reply(&self, saga: u64, step: u8, recorded: &Recorded) {
        let database = [Product, Order, Payment][usize::from(step)];
        let phase = u8::from(recorded.outcome == Outcome::Compensated);
        let row = params![saga.cast_signed(), step, phase, &recorded.encode()[..], recorded.at.cast_signed()];
        self.open(database).execute("INSERT INTO saga_barrier VALUES (?, ?, ?, ?, ?)", row).unwrap();
    }

    fn purchase(
        &self,
        id: u64,
        amount: i64,
        state: u8,
        finished_no: Option<i64>,
        reason: Option<&str>,
        path: &[(u8, Recorded)],
    ) {
        let entry = |(step, recorded): &(u8, Recorded)| Entry {
            step: StepIndex(*step),
            outcome: recorded.outcome.clone(),
            at: recorded.at,
        };
        let path: saga::Path = path.iter().map(entry).collect();
        let path = (state != 0).then(|| encode_path(&path));
        let row = params![
            id.cast_signed(),
            ANN.cast_signed(),
            format!("k{id}"),
            state,
            &cart(amount).to_input()[..],
            (state == 0).then_some(99),
            finished_no,
            reason,
            path
        ];
        let sql =
            "INSERT INTO purchase (id, customer_id, idempotency_key, state, input, next_wake_at, finished_no,
                       reason, path, trace, created_at, deadline_at, tries)
                   VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, '', 10, 100, 0)";
        self.open(Database::Purchase).execute(sql, row).unwrap();
    }

    fn order(&self, id: u64, amount: i64) {
        let items = format!("[[{LAMP},{amount},30]]");
        let row = params![id.cast_signed(), ANN.cast_signed(), items];
        self.open(Order).execute("INSERT INTO purchase_order VALUES (?, ?, ?, 1)", row).unwrap();
    }

    fn payment(&self, id: u64, amount: i64) {
        let row = params![id.cast_signed(), ANN.cast_signed(), amount];
        self.open(Payment).execute("INSERT INTO payment VALUES (?, ?, 'US', ?, 1)", row).unwrap();
    }

    fn report(&self) -> Report {
        check(self.dir.path(), &self.expected).unwrap()
    }

    fn violations(&self) -> Vec<Violation> {
        self.report().violations
    }
}

fn cart(amount: i64) -> Purchase {
    let items = vec![PurchasedItem { product_id: LAMP, amount, price: 30 }];
    Purchase { customer_id: ANN, items, currency_code: "US".to_owned(), total: 30 * amount }
}

fn done(at: u64) -> Recorded {
    Recorded { outcome: Outcome::Done(Vec::new()), at }
}

fn rejected(why: &str, at: u64) -> Recorded {
    Recorded { outcome: Outcome::Rejected(Reason::Refused(why.to_owned())), at }
}

fn tombstone(at: u64) -> Recorded {
    Recorded { outcome: Outcome::Rejected(Reason::Cancelled), at }
}

fn compensated(at: u64) -> Recorded {
    Recorded { outcome: Outcome::Compensated, at }
}

/// Breaks a good shop by SQL, and sees exactly these violations.
#[track_caller]
fn finds(database: Database, statements: &str, expected: &[Violation]) {
    let shop = Shop::good();
    shop.sql(database, statements);
    assert_eq!(shop.violations(), expected, "after {statements}");
}

#[test]
fn a_good_shop_is_good_whether_it_runs_or_was_stopped() {
    let shop = Shop::good();
    let report = shop.report();
    report.assert_clean();
    let Report { accepted, committed, aborted, parked, open, .. } = report;
    assert_eq!((accepted, committed, aborted, parked, open), (5, 1, 3, 0, 1));
    let conn = shop.open(Database::Purchase);
    conn.execute_batch("PRAGMA journal_mode = WAL; BEGIN IMMEDIATE; UPDATE purchase SET tries = 1").unwrap();
    shop.report().assert_clean();
}

#[test]
fn a_shop_that_is_not_there_is_no_good_shop() {
    assert!(check(Path::new("/nowhere"), &Expected::default()).is_err());
}

#[test]
fn i1_stock() {
    let off = Violation::Stock { product: LAMP, initial: LAMPS, sold: 3, found: 8 };
    finds(Product, "UPDATE product SET inventory = 8", &[off]);
    let below = [
        Violation::NegativeStock { product: LAMP, found: -1 },
        Violation::Stock { product: LAMP, initial: LAMPS, sold: 3, found: -1 },
    ];
    finds(Product, "UPDATE product SET inventory = -1", &below);
    finds(Product, "DELETE FROM product", &[Violation::LostProduct { product: LAMP }]);
    let strange = Violation::UnknownProduct { product: 502 };
    finds(Product, "INSERT INTO product VALUES (502, '', '', '', 1, 1, 0)", &[strange]);
}

#[test]
fn i2_what_was_acknowledged() {
    let mut shop = Shop::good();
    shop.expected.acknowledged.insert(4711);
    assert_eq!(shop.violations(), [Violation::LostPurchase { purchase: 4711 }]);

    let mut shop = Shop::good();
    shop.expected.keys.insert("k9001".to_owned(), OPEN);
    shop.expected.keys.insert("lost".to_owned(), 1);
    let moved = |key: &str, answered, found| Violation::KeyMoved { key: key.to_owned(), answered, found };
    assert_eq!(shop.violations(), [moved("k9001", OPEN, Some(PAID)), moved("lost", 1, None)]);

    let statements = "UPDATE purchase SET idempotency_key = 'k9001' WHERE id = 9002";
    let key = "k9001".to_owned();
    let twice = Violation::KeyTwice { customer: ANN, key, purchases: vec![PAID, DECLINED] };
    finds(Database::Purchase, statements, &[twice]);
}

#[test]
fn i3_one_answer_to_each_question() {
    let twice = "CREATE TABLE copy AS SELECT * FROM saga_barrier;
                 INSERT INTO copy SELECT * FROM saga_barrier WHERE saga = 9001;
                 DROP TABLE saga_barrier; ALTER TABLE copy RENAME TO saga_barrier";
    let (database, saga) = (Order, PAID);
    finds(Order, twice, &[Violation::RepliedTwice { database, saga, step: 1, phase: 0, rows: 2 }]);

    let twice = "CREATE TABLE copy AS SELECT * FROM payment; INSERT INTO copy SELECT * FROM payment;
                 DROP TABLE payment; ALTER TABLE copy RENAME TO payment";
    let expected = [
        Violation::EffectTwice { purchase: PAID, effect: Effect::Payment, rows: 2 },
        Violation::SumOfPayments { payments: 120, committed: 60 },
    ];
    finds(Payment, twice, &expected);
    let twice =
        "CREATE TABLE copy AS SELECT * FROM purchase_order; INSERT INTO copy SELECT * FROM purchase_order;
                 DROP TABLE purchase_order; ALTER TABLE copy RENAME TO purchase_order";
    finds(Order, twice, &[Violation::EffectTwice { purchase: PAID, effect: Effect::Order, rows: 2 }]);

    let shop = Shop::good();
    let foreign = "INSERT INTO saga_barrier SELECT 9003, 1, 0, reply, 1 FROM saga_barrier WHERE saga = 9003";
    shop.sql(Product, foreign);
    let found = shop.violations();
    let wrong = Violation::WrongParticipant { database: Product, saga: SOLD_OUT, step: 1 };
    assert_eq!(found, [wrong, Violation::ReplyLeftOut { purchase: SOLD_OUT, step: 1, phase: 0 }]);

    let shop = Shop::good();
    shop.reply(4711, 1, &rejected("no", 1));
    assert_eq!(shop.violations(), [Violation::UnknownSaga { database: Order, saga: 4711 }]);
}

#[test]
fn i3_the_path_is_what_was_recorded() {
    let shop = Shop::good();
    shop.sql(Payment, "DELETE FROM saga_barrier WHERE saga = 9001");
    shop.reply(PAID, 2, &done(14));
    assert_eq!(shop.violations(), [Violation::OtherReply { purchase: PAID, place: 2 }], "another time");

    let shop = Shop::good();
    shop.reply(SOLD_OUT, 1, &rejected("never asked", 1));
    let left_out = Violation::ReplyLeftOut { purchase: SOLD_OUT, step: 1, phase: 0 };
    assert_eq!(shop.violations(), [left_out]);

    let shop = Shop::good();
    shop.sql(Product, "UPDATE saga_barrier SET reply = x'ff' WHERE saga = 9003");
    let found = shop.violations();
    assert!(
        matches!(
            &found[..],
            [
                Violation::WrongReply { saga: SOLD_OUT, step: 0, phase: 0, .. },
                Violation::OtherReply { purchase: SOLD_OUT, place: 0 }
            ]
        ),
        "{found:?}"
    );
    let shop = Shop::good();
    shop.sql(Product, "UPDATE saga_barrier SET phase = 1 WHERE saga = 9003");
    assert!(matches!(&shop.violations()[..], [Violation::WrongReply { saga: SOLD_OUT, phase: 1, .. }, ..]));
}

#[test]
fn i4_all_or_nothing() {
    let purchase = PAID;
    let missing =
        |effect| [Violation::ReplyAlone { purchase, effect }, Violation::NotLive { purchase, effect }];
    let mut expected = missing(Effect::Order).to_vec();
    expected.push(Violation::Paid { purchase, paid: 60, sum: None });
    finds(Order, "DELETE FROM purchase_order", &expected);
    let mut expected = missing(Effect::Payment).to_vec();
    expected.push(Violation::SumOfPayments { payments: 0, committed: 60 });
    finds(Payment, "DELETE FROM payment", &expected);

    // The reservation of a success is given back.
    let shop = Shop::good();
    shop.reply(PAID, 0, &compensated(60));
    let expected = [
        Violation::NotLive { purchase, effect: Effect::Reservation },
        Violation::ReplyLeftOut { purchase, step: 0, phase: 1 },
    ];
    assert_eq!(shop.violations(), expected);

    // A failure keeps its order, or its payment.
    let (purchase, still) = (DECLINED, |effect| Violation::StillLive { purchase: DECLINED, effect });
    let shop = Shop::good();
    shop.order(DECLINED, 3);
    let alone = Violation::EffectAlone { purchase, effect: Effect::Order };
    assert_eq!(shop.violations(), [alone, still(Effect::Order)]);
    let shop = Shop::good();
    shop.payment(DECLINED, 90);
    assert_eq!(
        shop.violations(),
        [
            Violation::EffectAlone { purchase, effect: Effect::Payment },
            still(Effect::Payment),
            Violation::Paid { purchase, paid: 90, sum: None },
            Violation::SumOfPayments { payments: 150, committed: 60 },
        ]
    );

    // A failure keeps its reservation: the stock would even add up.
    let shop = Shop::good();
    shop.sql(Product, "DELETE FROM saga_barrier WHERE saga = 9002 AND phase = 1");
    let found = shop.violations();
    assert_eq!(found, [still(Effect::Reservation), Violation::OtherReply { purchase, place: 4 }]);

    // Of a purchase that nobody accepted.
    let shop = Shop::good();
    shop.order(4711, 1);
    let of_nobody = Violation::EffectOfNobody { purchase: 4711, effect: Effect::Order };
    assert_eq!(shop.violations(), [of_nobody]);
}

#[test]
fn i5_money() {
    let purchase = PAID;
    let expected = [
        Violation::Paid { purchase, paid: 61, sum: Some(60) },
        Violation::SumOfPayments { payments: 61, committed: 60 },
    ];
    finds(Payment, "UPDATE payment SET amount = 61", &expected);
    let (accepted, found) = ("US".to_owned(), "NT".to_owned());
    let other = Violation::Currency { purchase, accepted, found };
    finds(Payment, "UPDATE payment SET currency_code = 'NT'", &[other]);

    for (items, sum) in [
        ("[[501,2,31]]", Some(62)),
        ("[[501,9223372036854775807,2]]", None),
        ("[[501,1,9223372036854775807],[502,1,1]]", None),
        ("no JSON", None),
    ] {
        let expected = [
            Violation::OtherOrder { purchase, found: items.to_owned() },
            Violation::Paid { purchase, paid: 60, sum },
        ];
        finds(Order, &format!("UPDATE purchase_order SET items = '{items}'"), &expected);
    }

    let shop = Shop::good();
    let wrong = Purchase { total: 91, ..cart(3) };
    let sql = "UPDATE purchase SET input = ? WHERE id = 9002";
    shop.open(Database::Purchase).execute(sql, [&wrong.to_input()[..]]).unwrap();
    assert_eq!(shop.violations(), [Violation::Total { purchase: DECLINED, total: 91, sum: Some(90) }]);

    let shop = Shop::good();
    shop.sql(Database::Purchase, "UPDATE purchase SET input = x'ff' WHERE id = 9002");
    let found = shop.violations();
    assert!(matches!(&found[..], [Violation::UnreadableInput { purchase: DECLINED, .. }]), "{found:?}");
}

#[test]
fn i6_everything_ends() {
    let purchase = OPEN;
    let mut shop = Shop::good();
    shop.expected.may_be_open = false;
    assert_eq!(shop.violations(), [Violation::Open { purchase, next_wake_at: Some(99) }]);

    let never = Violation::NeverDue { purchase };
    finds(Database::Purchase, "UPDATE purchase SET next_wake_at = NULL", &[never]);

    let park = "UPDATE purchase SET state = 4, next_wake_at = NULL, reason = 'why' WHERE id = 9005";
    finds(Database::Purchase, park, &[Violation::Parked { purchase, reason: Some("why".to_owned()) }]);
    let mut shop = Shop::good();
    shop.sql(Database::Purchase, park);
    shop.expected.parked.insert(OPEN);
    let report = shop.report();
    report.assert_clean();
    assert_eq!((report.open, report.parked), (0, 1));

    let unknown = Violation::UnknownState { purchase, state: 9 };
    finds(Database::Purchase, "UPDATE purchase SET state = 9 WHERE id = 9005", &[unknown]);
}

#[test]
fn i10_ids() {
    let big = 1_u64 << 53;
    let statements = format!(
        "INSERT INTO customer SELECT {big}, 'A', 'B', 'x', 'x', 'x', '2', '2', 'hash', 1, 0;
         INSERT INTO customer SELECT -1, 'A', 'B', 'y', 'y', 'x', '3', '3', 'hash', 1, 0"
    );
    let bad = |id| Violation::IdOutOfRange { database: Account, id };
    finds(Account, &statements, &[bad(big), bad(u64::MAX)]);

    let twice = "CREATE TABLE copy AS SELECT * FROM purchase;
                 INSERT INTO copy SELECT * FROM purchase WHERE id = 9003;
                 DROP TABLE purchase; ALTER TABLE copy RENAME TO purchase";
    let shop = Shop::good();
    shop.sql(Database::Purchase, twice);
    let twice = Violation::IdTwice { database: Database::Purchase, id: SOLD_OUT, rows: 2 };
    assert!(shop.violations().contains(&twice));
}

#[test]
fn i11_whose_it_is() {
    let theirs = |purchase| Violation::UnknownCustomer { purchase, customer: ANN };
    let all = [PAID, DECLINED, SOLD_OUT, CANCELLED, OPEN].map(theirs);
    finds(Account, "DELETE FROM customer", &all);
    let wrong = |effect| Violation::WrongCustomer { purchase: PAID, effect, customer: 8 };
    finds(Order, "UPDATE purchase_order SET customer_id = 8", &[wrong(Effect::Order)]);
    finds(Payment, "UPDATE payment SET customer_id = 8", &[wrong(Effect::Payment)]);
}

#[test]
fn i12_the_path_is_a_history() {
    let purchase = SOLD_OUT;
    for path in ["NULL", "x'ff'"] {
        let shop = Shop::good();
        shop.sql(Database::Purchase, &format!("UPDATE purchase SET path = {path} WHERE id = 9003"));
        let found = shop.violations();
        assert!(matches!(&found[..], [Violation::UnreadablePath { purchase: SOLD_OUT, .. }]), "{found:?}");
    }
    let set_path = |path: &[(u8, Recorded)]| {
        let entry = |(step, recorded): &(u8, Recorded)| Entry {
            step: StepIndex(*step),
            outcome: recorded.outcome.clone(),
            at: recorded.at,
        };
        let path: saga::Path = path.iter().map(entry).collect();
        let shop = Shop::good();
        let sql = "UPDATE purchase SET path = ? WHERE id = 9003";
        shop.open(Database::Purchase).execute(sql, [encode_path(&path)]).unwrap();
        shop.violations()
    };
    let found = set_path(&[(1, rejected(OUT_OF_STOCK, 31))]);
    assert!(matches!(&found[..], [Violation::IllegalPath { purchase: SOLD_OUT, .. }]), "{found:?}");
    let found = set_path(&[]);
    let reason = Some(OUT_OF_STOCK.to_owned());
    let open = Violation::OtherEnd { purchase, state: 2, reason, end: None };
    assert_eq!(found, [open, Violation::ReplyLeftOut { purchase, step: 0, phase: 0 }]);

    let other_end = |state, reason: Option<&str>| Violation::OtherEnd {
        purchase,
        state,
        reason: reason.map(str::to_owned),
        end: Some(End::Aborted),
    };
    let cancelled = "UPDATE purchase SET state = 3 WHERE id = 9003";
    finds(Database::Purchase, cancelled, &[other_end(3, Some(OUT_OF_STOCK))]);
    let other = "UPDATE purchase SET reason = 'other' WHERE id = 9003";
    finds(Database::Purchase, other, &[other_end(2, Some("other"))]);
    let early = "UPDATE purchase SET path = x'' WHERE id = 9005";
    finds(Database::Purchase, early, &[Violation::EndedTooEarly { purchase: OPEN }]);
}

#[test]
fn i12_ended_purchases_are_numbered_without_a_gap() {
    let numbers = |last, purchases: &[u64]| Violation::FinishNumbers { last, purchases: purchases.to_vec() };
    finds(Database::Purchase, "UPDATE purchase_finish SET no = 5", &[numbers(5, &[])]);
    let same = "UPDATE purchase SET finished_no = 3 WHERE id = 9004";
    finds(Database::Purchase, same, &[numbers(4, &[SOLD_OUT, CANCELLED])]);
    let beyond = "UPDATE purchase SET finished_no = 5 WHERE id = 9004";
    finds(Database::Purchase, beyond, &[numbers(4, &[CANCELLED])]);
}

/// The tables behind the view, as they should be: one purchase is open, three have ended, two of these are listed.
const FILES: &str = "INSERT INTO purchase_accepted
                     SELECT id, 7, NULL, NULL, x'', '', 1, 1 FROM purchase WHERE id IN (9001, 9002, 9003, 9005);
                     INSERT INTO purchase_open VALUES (9005, 7, 1, 0, 99, 0, NULL, NULL);
                     INSERT INTO purchase_ended VALUES (1, 9001, 7, 1, 1, NULL, x''), (2, 9002, 7, 2, 1, '', x''),
                                                       (3, 9003, 7, 2, 1, '', x'');
                     INSERT INTO customer_purchase VALUES (7, 9001), (7, 9002);
                     INSERT INTO customer_ended VALUES (7, 1), (7, 2);
                     UPDATE purchase_finish SET indexed = 2;";

/// Sees exactly these contradictions after a change to such tables.
#[track_caller]
fn misfiled(change: &str, expected: &[&str]) {
    let shop = Shop::good();
    shop.sql(Database::Purchase, &format!("{FILES} {change}"));
    let found = shop.violations();
    assert!(found.iter().all(|violation| matches!(violation, Violation::Misfiled(_))), "{found:?}");
    let found: Vec<String> = found.iter().map(Violation::to_string).collect();
    let expected: Vec<String> = expected.iter().map(|what| format!("I2: {what}")).collect();
    assert_eq!(found, expected, "after {change}");
}

#[test]
fn i2_the_tables_behind_the_view_agree() {
    misfiled("", &[]);

    let nowhere = "purchase 9005 has 0 rows in purchase_open and 0 in purchase_ended";
    misfiled("DELETE FROM purchase_open", &[nowhere]);
    let nowhere = "purchase 9003 has 0 rows in purchase_open and 0 in purchase_ended";
    misfiled("DELETE FROM purchase_ended WHERE id = 9003", &[nowhere]);
    let both = "INSERT INTO purchase_open VALUES (9003, 7, 1, 0, 99, 0, NULL, NULL)";
    misfiled(both, &["purchase 9003 has 1 rows in purchase_open and 1 in purchase_ended"]);
    let twice = "CREATE TABLE copy AS SELECT * FROM purchase_open;
                 INSERT INTO copy SELECT * FROM purchase_open;
                 DROP TABLE purchase_open; ALTER TABLE copy RENAME TO purchase_open";
    misfiled(twice, &["purchase 9005 has 2 rows in purchase_open and 0 in purchase_ended"]);

    let forgotten = "DELETE FROM purchase_accepted WHERE id = 9005";
    misfiled(forgotten, &["purchase 9005 is in purchase_open and not in purchase_accepted"]);
    let forgotten = "DELETE FROM purchase_accepted WHERE id = 9003";
    misfiled(forgotten, &["purchase 9003 is in purchase_ended and not in purchase_accepted"]);

    let other = "purchase 9005 belongs to customer 7 and in purchase_open to customer 8";
    misfiled("UPDATE purchase_open SET customer_id = 8", &[other]);
    let other = "purchase 9003 belongs to customer 7 and in purchase_ended to customer 8";
    misfiled("UPDATE purchase_ended SET customer_id = 8 WHERE id = 9003", &[other]);
}

#[test]
fn i2_what_has_ended_is_listed_by_customer() {
    let left_out = "customer_purchase leaves out 9002 of customer 7";
    misfiled("DELETE FROM customer_purchase WHERE id = 9002", &[left_out]);
    let left_out = "customer_ended leaves out 1 of customer 7";
    misfiled("DELETE FROM customer_ended WHERE finished_no = 1", &[left_out]);
    let behind =
        ["customer_purchase leaves out 9003 of customer 7", "customer_ended leaves out 3 of customer 7"];
    misfiled("UPDATE purchase_finish SET indexed = 3", &behind);

    let odd = |table: &str, number: u64, customer: u64| {
        format!("{table} has {number} of customer {customer}, which should not be there")
    };
    misfiled("INSERT INTO customer_purchase VALUES (7, 9003)", &[&odd("customer_purchase", SOLD_OUT, ANN)]);
    misfiled("INSERT INTO customer_ended VALUES (7, 3)", &[&odd("customer_ended", 3, ANN)]);
    let ahead = [odd("customer_purchase", DECLINED, ANN), odd("customer_ended", 2, ANN)];
    misfiled("UPDATE purchase_finish SET indexed = 1", &[&ahead[0], &ahead[1]]);
    misfiled("INSERT INTO customer_purchase VALUES (7, 9005)", &[&odd("customer_purchase", OPEN, ANN)]);
    let moved = "UPDATE customer_ended SET customer_id = 8 WHERE finished_no = 2";
    misfiled(moved, &["customer_ended leaves out 2 of customer 7", &odd("customer_ended", 2, 8)]);

    let beyond = "purchases are listed up to the finish number 5; the last one is 4";
    misfiled("UPDATE purchase_finish SET indexed = 5", &[behind[0], behind[1], beyond]);
}

#[test]
fn a_damaged_file_is_named() {
    // Two tables on one page.
    let statements = "PRAGMA writable_schema = ON;
                      UPDATE sqlite_schema SET rootpage =
                          (SELECT rootpage FROM sqlite_schema WHERE name = 'product') WHERE name = 'id_lease'";
    let shop = Shop::good();
    shop.sql(Product, statements);
    let found = shop.violations();
    assert!(
        found.iter().all(|violation| matches!(violation, Violation::Damaged { database: Product, .. }))
            && !found.is_empty(),
        "{found:?}"
    );
}
