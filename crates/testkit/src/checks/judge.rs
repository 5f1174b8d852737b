//! The judgement: from rows to violations, without I/O.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use bytes::Bytes;
use saga::{End, Outcome, Position, Reason};
use shop::purchase::{Purchase as Cart, purchase_saga};
use wire::messages::{Recorded, decode_path};

use super::rows::{Filed, Files, Listed, Order, Payment, Purchase, Rows};
use super::violation::{Database, Effect, Misfiling, Table, Violation};
use super::{Expected, Report};

/// Ids are below it.
const ID_END: u64 = 1 << 53;

/// The phases of barrier rows.
const ACTION: u8 = 0;
const COMPENSATION: u8 = 1;

/// The steps in their order: whose they are, and what they leave behind.
const STEPS: [(Database, Effect); 3] = [
    (Database::Product, Effect::Reservation),
    (Database::Order, Effect::Order),
    (Database::Payment, Effect::Payment),
];

/// How a purchase stands, by its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Succeeded,
    Failed,
    Cancelled,
    NeedsOperator,
}

impl State {
    fn of(number: i64) -> Option<State> {
        use State::*;
        [Open, Succeeded, Failed, Cancelled, NeedsOperator].get(usize::try_from(number).ok()?).copied()
    }
}

/// A barrier row's key: saga, step, phase.
type Key = (u64, u8, u8);

/// The rows, found by their keys.
struct Shop<'a> {
    rows: &'a Rows,
    expected: &'a Expected,
    by_id: HashMap<u64, &'a Purchase>,
    carts: HashMap<u64, Cart>,
    replies: HashMap<Key, Recorded>,
    orders: HashMap<u64, &'a Order>,
    payments: HashMap<u64, &'a Payment>,
}

/// Judges what was read.
pub(crate) fn judge(rows: &Rows, expected: &Expected) -> Report {
    let mut found: Vec<Violation> = Vec::new();
    found.extend(rows.damaged.iter().map(|(database, what)| {
        let (database, what) = (*database, what.clone());
        Violation::Damaged { database, what }
    }));
    let shop = Shop::index(rows, expected, &mut found);
    found.extend(shop.ids());
    found.extend(shop.stock());
    found.extend(shop.acceptance());
    found.extend(shop.barrier());
    found.extend(shop.rows_of_nobody());
    for purchase in &rows.purchases {
        found.extend(shop.effects(purchase));
        found.extend(shop.money(purchase));
        found.extend(shop.end(purchase));
        found.extend(shop.history(purchase));
    }
    found.extend(shop.sum_of_payments());
    found.extend(shop.finish_numbers());
    found.extend(misfilings(&rows.files, rows.last_finished_no).into_iter().map(Violation::Misfiled));
    let count = |states: &[State]| {
        let counted = |purchase: &&Purchase| State::of(purchase.state).is_some_and(|it| states.contains(&it));
        rows.purchases.iter().filter(counted).count()
    };
    Report {
        accepted: rows.purchases.len(),
        committed: count(&[State::Succeeded]),
        aborted: count(&[State::Failed, State::Cancelled]),
        parked: count(&[State::NeedsOperator]),
        open: count(&[State::Open]),
        violations: found,
    }
}

impl<'a> Shop<'a> {
    fn index(rows: &'a Rows, expected: &'a Expected, found: &mut Vec<Violation>) -> Shop<'a> {
        let mut replies = HashMap::new();
        for row in &rows.barrier {
            let (saga, step, phase) = (row.saga, row.step, row.phase);
            match Recorded::decode(&Bytes::copy_from_slice(&row.reply)) {
                Ok(reply) if fits(&reply.outcome, phase) => {
                    replies.insert((saga, step, phase), reply);
                }
                Ok(reply) => {
                    let what = format!("{:?}", reply.outcome);
                    found.push(Violation::WrongReply { saga, step, phase, what });
                }
                Err(error) => {
                    let what = error.to_string();
                    found.push(Violation::WrongReply { saga, step, phase, what });
                }
            }
        }
        let mut carts = HashMap::new();
        for purchase in &rows.purchases {
            match Cart::from_input(&Bytes::copy_from_slice(&purchase.input)) {
                Ok(cart) => {
                    carts.insert(purchase.id, cart);
                }
                Err(error) => {
                    let why = error.to_string();
                    found.push(Violation::UnreadableInput { purchase: purchase.id, why });
                }
            }
        }
        Shop {
            rows,
            expected,
            by_id: rows.purchases.iter().map(|row| (row.id, row)).collect(),
            carts,
            replies,
            orders: rows.orders.iter().map(|row| (row.id, row)).collect(),
            payments: rows.payments.iter().map(|row| (row.id, row)).collect(),
        }
    }

    /// Whether a step's effect was had and not undone, by its participant's own record.
    fn recorded_live(&self, saga: u64, step: u8) -> bool {
        let done = self.replies.get(&(saga, step, ACTION)).map(|reply| &reply.outcome);
        matches!(done, Some(Outcome::Done(_))) && !self.replies.contains_key(&(saga, step, COMPENSATION))
    }

    fn is_live(&self, saga: u64, effect: Effect) -> bool {
        match effect {
            Effect::Reservation => self.recorded_live(saga, 0),
            Effect::Order => self.orders.contains_key(&saga),
            Effect::Payment => self.payments.contains_key(&saga),
        }
    }

    /// I10.
    fn ids(&self) -> Vec<Violation> {
        let Rows { customers, products, orders, payments, purchases, .. } = self.rows;
        let tables: [(Database, Vec<u64>); 5] = [
            (Database::Account, customers.clone()),
            (Database::Product, products.iter().map(|row| row.id).collect()),
            (Database::Order, orders.iter().map(|row| row.id).collect()),
            (Database::Payment, payments.iter().map(|row| row.id).collect()),
            (Database::Purchase, purchases.iter().map(|row| row.id).collect()),
        ];
        let mut found = Vec::new();
        for (database, ids) in tables {
            for (id, rows) in counted(ids) {
                if !(1..ID_END).contains(&id) {
                    found.push(Violation::IdOutOfRange { database, id });
                }
                match database {
                    _ if rows == 1 => {}
                    Database::Order => {
                        found.push(Violation::EffectTwice { purchase: id, effect: Effect::Order, rows });
                    }
                    Database::Payment => {
                        found.push(Violation::EffectTwice { purchase: id, effect: Effect::Payment, rows });
                    }
                    Database::Account | Database::Product | Database::Purchase => {
                        found.push(Violation::IdTwice { database, id, rows });
                    }
                }
            }
        }
        found
    }

    /// I1: what committed purchases bought is gone, and what those that have not ended hold; nothing else.
    fn stock(&self) -> Vec<Violation> {
        let mut sold: HashMap<u64, i128> = HashMap::new();
        for purchase in &self.rows.purchases {
            let counts = match State::of(purchase.state) {
                Some(State::Succeeded) => true,
                Some(State::Failed | State::Cancelled) => false,
                Some(State::Open | State::NeedsOperator) | None => self.recorded_live(purchase.id, 0),
            };
            let cart = self.carts.get(&purchase.id).filter(|_| counts);
            for item in cart.iter().flat_map(|cart| &cart.items) {
                *sold.entry(item.product_id).or_default() += i128::from(item.amount);
            }
        }
        let mut found = Vec::new();
        for row in &self.rows.products {
            let product = row.id;
            if row.inventory < 0 {
                found.push(Violation::NegativeStock { product, found: row.inventory });
            }
            let sold = sold.get(&product).copied().unwrap_or_default();
            match self.expected.stock.get(&product) {
                None => found.push(Violation::UnknownProduct { product }),
                Some(initial) if i128::from(*initial) - sold != i128::from(row.inventory) => {
                    found.push(Violation::Stock { product, initial: *initial, sold, found: row.inventory });
                }
                Some(_) => {}
            }
        }
        let there: HashSet<u64> = self.rows.products.iter().map(|row| row.id).collect();
        let lost = self.expected.stock.keys().filter(|id| !there.contains(id));
        found.extend(lost.map(|product| Violation::LostProduct { product: *product }));
        found
    }

    /// I2, and that each purchase is somebody's.
    fn acceptance(&self) -> Vec<Violation> {
        let lost = self.expected.acknowledged.iter().filter(|id| !self.by_id.contains_key(id));
        let mut found: Vec<Violation> =
            lost.map(|purchase| Violation::LostPurchase { purchase: *purchase }).collect();

        let mut under: BTreeMap<(u64, &str), Vec<u64>> = BTreeMap::new();
        for row in &self.rows.purchases {
            if let Some(key) = &row.key {
                under.entry((row.customer, key)).or_default().push(row.id);
            }
        }
        for ((customer, key), purchases) in &under {
            if purchases.len() > 1 {
                let (key, purchases) = ((*key).to_owned(), purchases.clone());
                found.push(Violation::KeyTwice { customer: *customer, key, purchases });
            }
        }
        let by_key: HashMap<&str, u64> = under.iter().map(|((_, key), ids)| (*key, ids[0])).collect();
        for (key, answered) in &self.expected.keys {
            let in_database = by_key.get(key.as_str()).copied();
            if in_database != Some(*answered) {
                let (key, answered) = (key.clone(), *answered);
                found.push(Violation::KeyMoved { key, answered, found: in_database });
            }
        }
        let customers: HashSet<u64> = self.rows.customers.iter().copied().collect();
        for row in self.rows.purchases.iter().filter(|row| !customers.contains(&row.customer)) {
            found.push(Violation::UnknownCustomer { purchase: row.id, customer: row.customer });
        }
        found
    }

    /// I3: one answer to each question, by the one who was asked, about a saga that there is.
    fn barrier(&self) -> Vec<Violation> {
        let mut found = Vec::new();
        let keys = self.rows.barrier.iter().map(|row| (row.database, row.saga, row.step, row.phase));
        for ((database, saga, step, phase), rows) in counted(keys) {
            if rows > 1 {
                found.push(Violation::RepliedTwice { database, saga, step, phase, rows });
            }
            if STEPS.get(usize::from(step)).is_none_or(|(owner, _)| *owner != database) {
                found.push(Violation::WrongParticipant { database, saga, step });
            }
        }
        let sagas: BTreeSet<(Database, u64)> =
            self.rows.barrier.iter().map(|row| (row.database, row.saga)).collect();
        let unknown = sagas.into_iter().filter(|(_, saga)| !self.by_id.contains_key(saga));
        found.extend(unknown.map(|(database, saga)| Violation::UnknownSaga { database, saga }));
        found
    }

    fn rows_of_nobody(&self) -> Vec<Violation> {
        let orders = self.orders.keys().map(|id| (*id, Effect::Order));
        let payments = self.payments.keys().map(|id| (*id, Effect::Payment));
        let all: BTreeSet<(u64, Effect)> = orders.chain(payments).collect();
        let nobody = all.into_iter().filter(|(id, _)| !self.by_id.contains_key(id));
        nobody.map(|(purchase, effect)| Violation::EffectOfNobody { purchase, effect }).collect()
    }

    /// I4: an effect and its record go together, and both with how the purchase ended.
    fn effects(&self, row: &Purchase) -> Vec<Violation> {
        let purchase = row.id;
        let mut found = Vec::new();
        for (step, (_, effect)) in (0..).zip(STEPS) {
            let (live, recorded) = (self.is_live(purchase, effect), self.recorded_live(purchase, step));
            match (live, recorded) {
                (true, false) => found.push(Violation::EffectAlone { purchase, effect }),
                (false, true) => found.push(Violation::ReplyAlone { purchase, effect }),
                (true, true) | (false, false) => {}
            }
            match State::of(row.state) {
                Some(State::Succeeded) if !live => found.push(Violation::NotLive { purchase, effect }),
                Some(State::Failed | State::Cancelled) if live => {
                    found.push(Violation::StillLive { purchase, effect });
                }
                _ => {}
            }
        }
        found
    }

    /// I5, and whose the order and the payment are.
    fn money(&self, row: &Purchase) -> Vec<Violation> {
        let Some(cart) = self.carts.get(&row.id) else { return Vec::new() };
        let (purchase, accepted) = (row.id, lines(cart));
        let mut found = Vec::new();
        let whose = |effect, customer: u64, found: &mut Vec<Violation>| {
            if customer != row.customer {
                found.push(Violation::WrongCustomer { purchase, effect, customer });
            }
        };
        whose(Effect::Reservation, cart.customer_id, &mut found);
        let sum = checked_sum(&accepted);
        if sum != Some(cart.total) {
            found.push(Violation::Total { purchase, total: cart.total, sum });
        }
        let mut ordered = None;
        if let Some(order) = self.orders.get(&purchase) {
            whose(Effect::Order, order.customer, &mut found);
            ordered = serde_json::from_str::<Vec<(u64, i64, i64)>>(&order.items).ok();
            if ordered.as_ref() != Some(&accepted) {
                found.push(Violation::OtherOrder { purchase, found: order.items.clone() });
            }
        }
        if let Some(payment) = self.payments.get(&purchase) {
            whose(Effect::Payment, payment.customer, &mut found);
            let sum = ordered.and_then(|lines| checked_sum(&lines));
            if sum != Some(payment.amount) {
                found.push(Violation::Paid { purchase, paid: payment.amount, sum });
            }
            if payment.currency != cart.currency_code {
                let (accepted, currency) = (cart.currency_code.clone(), payment.currency.clone());
                found.push(Violation::Currency { purchase, accepted, found: currency });
            }
        }
        found
    }

    /// I5, over all. A payment whose purchase has not ended counts on both sides.
    fn sum_of_payments(&self) -> Option<Violation> {
        let payments: i128 = self.rows.payments.iter().map(|row| i128::from(row.amount)).sum();
        let committed = self.rows.purchases.iter().filter(|row| match State::of(row.state) {
            Some(State::Succeeded) => true,
            Some(State::Failed | State::Cancelled) => false,
            Some(State::Open | State::NeedsOperator) | None => self.payments.contains_key(&row.id),
        });
        let totals = committed.filter_map(|row| self.carts.get(&row.id)).map(|cart| i128::from(cart.total));
        let committed = totals.sum();
        (payments != committed).then_some(Violation::SumOfPayments { payments, committed })
    }

    /// I6.
    fn end(&self, row: &Purchase) -> Vec<Violation> {
        let purchase = row.id;
        let mut found = Vec::new();
        match State::of(row.state) {
            Some(State::Open) => {
                if row.next_wake_at.is_none() {
                    found.push(Violation::NeverDue { purchase });
                }
                if !self.expected.may_be_open {
                    found.push(Violation::Open { purchase, next_wake_at: row.next_wake_at });
                }
            }
            Some(State::NeedsOperator) if !self.expected.parked.contains(&purchase) => {
                found.push(Violation::Parked { purchase, reason: row.reason.clone() });
            }
            Some(State::NeedsOperator | State::Succeeded | State::Failed | State::Cancelled) => {}
            None => found.push(Violation::UnknownState { purchase, state: row.state }),
        }
        found
    }

    /// I12: the kept path is a legal history that ends as the purchase did, and that its participants recorded.
    fn history(&self, row: &Purchase) -> Vec<Violation> {
        let purchase = row.id;
        match State::of(row.state) {
            Some(State::Succeeded | State::Failed | State::Cancelled) => {}
            Some(State::Open | State::NeedsOperator) | None => {
                let early = row.path.is_some() || row.finished_no.is_some();
                return early.then_some(Violation::EndedTooEarly { purchase }).into_iter().collect();
            }
        }
        let path = match row.path.as_deref().map(decode_path) {
            Some(Ok(path)) => path,
            Some(Err(error)) => {
                return vec![Violation::UnreadablePath { purchase, why: error.to_string() }];
            }
            None => return vec![Violation::UnreadablePath { purchase, why: "it is null".to_owned() }],
        };
        let definition = purchase_saga();
        let told = saga::events(&definition, row.created_at, &path).map(drop);
        let position = told.and_then(|()| path.position(&definition));
        let end = match position {
            Ok(Position::Ended(end)) => Some(end),
            Ok(Position::Forward(_) | Position::Backward(_)) => None,
            Err(illegal) => return vec![Violation::IllegalPath { purchase, why: illegal.to_string() }],
        };
        let mut found = Vec::new();
        if !ends_as(row, end, path.rejection()) {
            let (state, reason) = (row.state, row.reason.clone());
            found.push(Violation::OtherEnd { purchase, state, reason, end });
        }
        found.extend(self.compare(purchase, &path));
        found
    }

    /// Every entry of a path is what its participant recorded, and every record is in the path.
    fn compare(&self, purchase: u64, path: &saga::Path) -> Vec<Violation> {
        let mut found = Vec::new();
        let mut told: HashSet<Key> = HashSet::new();
        for (place, entry) in path.entries().iter().enumerate() {
            let phase = if entry.outcome == Outcome::Compensated { COMPENSATION } else { ACTION };
            let key = (purchase, entry.step.0, phase);
            told.insert(key);
            let same = self
                .replies
                .get(&key)
                .is_some_and(|recorded| recorded.outcome == entry.outcome && recorded.at == entry.at);
            if !same {
                found.push(Violation::OtherReply { purchase, place });
            }
        }
        for (step, phase) in (0..).flat_map(|step| [(step, ACTION), (step, COMPENSATION)]).take(6) {
            let key = (purchase, step, phase);
            if self.replies.contains_key(&key) && !told.contains(&key) && !self.is_tombstone(&key) {
                found.push(Violation::ReplyLeftOut { purchase, step, phase });
            }
        }
        found
    }

    /// A step that was only asked to cancel left a record that says so; a path that ended before that step does not tell it.
    fn is_tombstone(&self, key: &Key) -> bool {
        let outcome = self.replies.get(key).map(|reply| &reply.outcome);
        outcome == Some(&Outcome::Rejected(Reason::Cancelled))
    }

    /// The numbers that streams of events resume by: 1, 2, 3 and so on, each once.
    fn finish_numbers(&self) -> Option<Violation> {
        let last = self.rows.last_finished_no;
        let mut taken: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for row in &self.rows.purchases {
            if let Some(number) = row.finished_no {
                taken.entry(number).or_default().push(row.id);
            }
        }
        let odd = |(number, ids): &(&u64, &Vec<u64>)| ids.len() > 1 || !(1..=last).contains(*number);
        let purchases: Vec<u64> = taken.iter().filter(odd).flat_map(|(_, ids)| ids.clone()).collect();
        let whole = purchases.is_empty() && taken.len() as u64 == last;
        (!whole).then_some(Violation::FinishNumbers { last, purchases })
    }
}

/// What the tables behind the view of purchases say must fit: a purchase that was accepted is open or has ended, and what ended
/// is listed by customer, up to a number.
fn misfilings(files: &Files, last: u64) -> Vec<Misfiling> {
    let Files { accepted, open, ended, listed, indexed } = files;
    let mut found = Vec::new();
    let ids = |rows: &[Filed]| counted(rows.iter().map(|row| row.id));
    let (open_rows, ended_rows) = (ids(open), ids(ended));
    for purchase in accepted.iter().map(|row| row.id) {
        let rows = |table: &BTreeMap<u64, usize>| table.get(&purchase).copied().unwrap_or_default();
        let (open, ended) = (rows(&open_rows), rows(&ended_rows));
        if open + ended != 1 {
            found.push(Misfiling::NotInOne { purchase, open, ended });
        }
    }
    let customers: HashMap<u64, u64> = accepted.iter().map(|row| (row.id, row.customer)).collect();
    for (table, rows) in [(Table::Open, open), (Table::Ended, ended)] {
        found.extend(rows.iter().filter_map(|row| {
            let purchase = row.id;
            match customers.get(&purchase) {
                None => Some(Misfiling::NotAccepted { purchase, table }),
                Some(&accepted) if accepted != row.customer => {
                    Some(Misfiling::OtherCustomer { purchase, table, accepted, found: row.customer })
                }
                Some(_) => None,
            }
        }));
    }
    let expected: BTreeSet<Listed> = ended
        .iter()
        .filter(|row| row.finished_no <= *indexed)
        .flat_map(|row| {
            [(Table::CustomerPurchase, row.id), (Table::CustomerEnded, row.finished_no)]
                .map(|(table, number)| Listed { table, customer: row.customer, number })
        })
        .collect();
    let listed: BTreeSet<Listed> = listed.iter().copied().collect();
    found.extend(expected.difference(&listed).map(|row| {
        let Listed { table, customer, number } = *row;
        Misfiling::NotListed { table, customer, number }
    }));
    found.extend(listed.difference(&expected).map(|row| {
        let Listed { table, customer, number } = *row;
        Misfiling::Listed { table, customer, number }
    }));
    if *indexed > last {
        found.push(Misfiling::ListedBeyond { indexed: *indexed, last });
    }
    found
}

/// Whether such a reply can be recorded in such a phase.
fn fits(outcome: &Outcome, phase: u8) -> bool {
    match outcome {
        Outcome::Done(_) | Outcome::Rejected(_) => phase == ACTION,
        Outcome::Compensated => phase == COMPENSATION,
    }
}

fn ends_as(row: &Purchase, end: Option<End>, rejection: Option<&Reason>) -> bool {
    match (State::of(row.state), end, rejection) {
        (Some(State::Succeeded), Some(End::Committed), None) => row.reason.is_none(),
        (Some(State::Failed), Some(End::Aborted), Some(Reason::Refused(why))) => {
            row.reason.as_ref() == Some(why)
        }
        (Some(State::Cancelled), Some(End::Aborted), Some(Reason::Cancelled)) => row.reason.is_some(),
        _ => false,
    }
}

/// A cart as its order writes it.
fn lines(cart: &Cart) -> Vec<(u64, i64, i64)> {
    cart.items.iter().map(|item| (item.product_id, item.amount, item.price)).collect()
}

/// The sum of amount times price, unless it overflows.
fn checked_sum(lines: &[(u64, i64, i64)]) -> Option<i64> {
    lines.iter().try_fold(0_i64, |sum, (_, amount, price)| sum.checked_add(amount.checked_mul(*price)?))
}

fn counted<T: Ord>(all: impl IntoIterator<Item = T>) -> BTreeMap<T, usize> {
    let mut counts = BTreeMap::new();
    for one in all {
        *counts.entry(one).or_default() += 1;
    }
    counts
}
