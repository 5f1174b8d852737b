//! The known bugs: each is a change to one file that some test must notice.
//!
//! They are the proof that the tests can fail. A mutant names the one test command that is expected to kill
//! it, so that a run takes minutes; that command has to pass on the tree as it is.

/// One bug.
pub(crate) struct Mutant {
    /// What it is called on the command line.
    pub(crate) name: &'static str,
    /// The file that it changes, relative to the workspace.
    pub(crate) file: &'static str,
    /// What it replaces. It stands in the file exactly once.
    pub(crate) find: &'static str,
    /// What it puts there.
    pub(crate) replace: &'static str,
    /// The arguments of the `cargo` that must fail. The first is `test`.
    pub(crate) test: &'static [&'static str],
    /// What would go wrong for a customer or an operator.
    pub(crate) why: &'static str,
}

/// All of them.
pub(crate) const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "bus-forgets-what-a-dead-handler-held",
        file: "crates/bus/src/embedded.rs",
        find: "        if !self.deliveries.is_empty() {\n            self.queue.give_back(",
        replace: "        if self.deliveries.len() > 1_000_000 {\n            self.queue.give_back(",
        test: &["test", "--package", "bus"],
        why: "a handler that panics takes its batch with it: those sagas stand still until they are driven again",
    },
    Mutant {
        name: "bus-bound-ignores-what-is-in-hand",
        file: "crates/bus/src/embedded.rs",
        find: "self.depth().held() + envelopes > capacity_envelopes",
        replace: "self.ready.len() + envelopes > capacity_envelopes",
        test: &["test", "--package", "bus"],
        why: "memory grows with everything that waits for its retry",
    },
    Mutant {
        name: "redelivered-command-is-answered-as-a-failure",
        file: "crates/participant/src/barrier.rs",
        find: "(Phase::Action | Phase::Cancel, Some(reply), _) => Ok(Decision::Answer(reply.clone())),",
        replace: "(Phase::Action, Some(_), _) => Ok(Decision::Answer(tombstone(0))),\n        \
                  (Phase::Cancel, Some(reply), _) => Ok(Decision::Answer(reply.clone())),",
        test: &["test", "--package", "participant", "--test", "barrier"],
        why: "a message that comes twice rolls a good purchase back",
    },
    Mutant {
        name: "redelivered-create-meets-its-own-row",
        file: "crates/participant/src/batch.rs",
        find: "let found = barrier::load(batch.tx, round.iter().map(|index| commands[*index].key()))?;",
        replace: "let found: HashMap<Key, barrier::Found> = HashMap::new();",
        test: &["test", "--package", "participant", "--test", "barrier"],
        why: "an order that is created twice hits its primary key, and the purchase is never answered",
    },
    Mutant {
        name: "unseen-batch-that-fails-is-kept",
        file: "crates/participant/src/runner.rs",
        find: "wary.store(WARY_BATCHES, Ordering::Relaxed);\n                        return Err(error);",
        replace: "let commands = commands.len();\n                        \
                  return Ok((vec![Answer::Retry(error.to_string()); commands], changes, 0));",
        test: &["test", "--package", "participant", "--test", "runner"],
        why: "a command that comes again has its effect a second time, and nothing says so",
    },
    Mutant {
        name: "any-error-is-a-business-failure",
        file: "crates/participant/src/batch.rs",
        find: "let outcomes = self.participant.act(self.tx, &work, self.changes)?;",
        replace: "let outcomes = self\n            .participant\n            .act(self.tx, &work, self.changes)\n            \
                  .unwrap_or_else(|error| vec![Outcome::Rejected(error.to_string()); places.len()]);",
        test: &["test", "--package", "participant", "--test", "runner"],
        why: "a full disk or a lost connection declines purchases for good",
    },
    Mutant {
        name: "no-answer-yet-is-a-business-failure",
        file: "crates/participant/src/batch.rs",
        find: "Outcome::Retry(why) => return Err(why),",
        replace: "Outcome::Retry(why) => saga::Outcome::Rejected(Reason::Refused(why)),",
        test: &["test", "--package", "participant", "--test", "barrier"],
        why: "a participant that is busy declines purchases for good",
    },
    Mutant {
        name: "compensation-delivered-twice-restocks-twice",
        file: "crates/participant/src/batch.rs",
        find: "Undone::Done => {\n                    let reply = barrier::compensated(self.now);\n                    \
               records.push(self.commands[place].key(), Row::Compensation, &reply, self.now);",
        replace: "Undone::Done => {\n                    let reply = barrier::compensated(self.now);",
        test: &["test", "--package", "e2e", "--test", "engine", "on_a_database"],
        why: "the shop sells what it does not have",
    },
    Mutant {
        name: "compensation-that-overtakes-leaves-no-tombstone",
        file: "crates/participant/src/batch.rs",
        find: "                    records.push(key, Row::Action, &barrier::tombstone(now), now);\n                    \
               let reply = barrier::compensated(now);\n                    \
               records.push(key, Row::Compensation, &reply, now);",
        replace: "                    let reply = barrier::compensated(now);",
        test: &["test", "--package", "participant", "--test", "barrier"],
        why: "the action that comes late reserves stock for a purchase that is rolled back, for ever",
    },
    Mutant {
        name: "cancellation-leaves-no-tombstone",
        file: "crates/participant/src/batch.rs",
        find: "Ok(Decision::Bury) => {\n                    let reply = barrier::tombstone(now);\n                    \
               records.push(key, Row::Action, &reply, now);",
        replace: "Ok(Decision::Bury) => {\n                    let reply = barrier::tombstone(now);",
        test: &["test", "--package", "e2e", "--test", "engine", "on_a_database"],
        why: "a late message pays for a purchase that was reported as rolled back",
    },
    Mutant {
        name: "cancelled-saga-still-acts",
        file: "crates/saga/src/machine.rs",
        find: "(Position::Forward(step), Mode::Cancel) => Ok((step, Phase::Cancel)),",
        replace: "(Position::Forward(step), Mode::Cancel) => Ok((step, Phase::Action)),",
        test: &["test", "--package", "saga", "--test", "machine"],
        why: "stock is reserved for a purchase that is known to be dead",
    },
    Mutant {
        name: "rejected-step-is-rolled-back-too",
        file: "crates/saga/src/path.rs",
        find: "Some(Kind::Compensatable | Kind::Pivot) => Ok(Position::back_from(step)),",
        replace: "Some(Kind::Compensatable | Kind::Pivot) => Ok(Position::Backward(step)),",
        test: &["test", "--package", "saga"],
        why: "a customer who finds the shop out of stock is told of a rollback of what never was",
    },
    Mutant {
        name: "rolled-back-is-told-before-it-is",
        file: "crates/saga/src/path.rs",
        find: "        if let Position::Forward(next) = position {\n            events.push(",
        replace: "        if let Position::Backward(next) = position {\n            let status = Status::RolledBack;\n            \
                  events.push(Event { step: name(next)?, status, at: entry.at, reason: None });\n        }\n        \
                  if let Position::Forward(next) = position {\n            events.push(",
        test: &["test", "--package", "saga"],
        why: "a customer is told that a purchase is rolled back while its payment may still stand",
    },
    Mutant {
        name: "refused-frame-is-acknowledged",
        file: "crates/drive/src/frames.rs",
        find: "verdicts[place] = self.retry(deliveries[place].count);",
        replace: "verdicts[place] = Verdict::Ack;",
        test: &["test", "--package", "e2e", "--test", "engine", "a_refused_frame"],
        why: "a message is acknowledged although a part of what it calls for was never sent",
    },
    Mutant {
        name: "refused-replies-are-forgotten",
        file: "crates/drive/src/frames.rs",
        find: "frame.causes.extend((!may_be_lost).then_some(place));",
        replace: "let _ = (may_be_lost, place);",
        test: &["test", "--package", "participant", "--test", "runner"],
        why: "a full bus makes purchases stand still until they are driven again",
    },
    Mutant {
        name: "known-saga-is-left-to-others",
        file: "crates/drive/src/plan.rs",
        find: "let known = self.find(about)?;\n        let carried",
        replace: "let known = self.find(about).filter(|_| token.saga == 0)?;\n        let carried",
        test: &["test", "--package", "participant", "--test", "runner", "driven_on"],
        why: "each step of a purchase takes two ways over the bus more",
    },
    Mutant {
        name: "known-saga-is-started-by-others",
        file: "crates/drive/src/plan.rs",
        find: "let known = self.find(about)?;\n        Some((known.begin)",
        replace: "let known = self.find(about).filter(|_| saga == 0)?;\n        Some((known.begin)",
        test: &["test", "--package", "sagaline", "--test", "trace"],
        why: "each purchase takes one way over the bus more",
    },
    Mutant {
        name: "undecodable-command-comes-for-ever",
        file: "crates/participant/src/runner.rs",
        find: "                }\n                Err(bad) => sorted.verdicts[place] = park(delivery, bad.to_string()),",
        replace: "                }\n                \
                  Err(_) => sorted.verdicts[place] = self.rest.settings.bounds.retry(delivery.count),",
        test: &["test", "--package", "participant", "--test", "runner"],
        why: "one bad message is tried for ever, and nobody hears of it",
    },
    Mutant {
        name: "undecodable-message-comes-for-ever",
        file: "services/orchestrator/src/lib.rs",
        find: "verdicts[place] = Verdict::Park { reason };",
        replace: "verdicts[place] = self.settings.bounds.retry(delivery.count);",
        test: &["test", "--package", "e2e", "--test", "engine", "is_parked"],
        why: "one bad message is tried for ever, and nobody hears of it",
    },
    Mutant {
        name: "purge-forgets-half-a-saga",
        file: "crates/participant/src/barrier.rs",
        find: "if !quiet || cut == Some(rows[0].0) {",
        replace: "if !quiet && rows[0].3 >= recorded_before || cut == Some(rows[0].0) {",
        test: &["test", "--package", "participant", "--test", "barrier"],
        why: "a message that comes late has its effect for the second time",
    },
    Mutant {
        name: "started-before-it-is-accepted",
        file: "services/purchase/src/accept.rs",
        find: "        let mut reruns = 0;\n",
        replace: "        let (all, mut traced) = (vec![true; wanted.len()], self.spans.handle(wanted.len()));\n        \
                  self.begin(after, &wanted, &all, &mut traced).await;\n        \
                  let mut reruns = 0;\n",
        test: &["test", "--package", "e2e", "--test", "flow", "nothing_is_started_before_it_is_accepted"],
        why: "a purchase that is not durable, and may be rolled back, reserves stock",
    },
    Mutant {
        name: "two-requests-of-a-batch-under-one-key",
        file: "services/purchase/src/accept.rs",
        find: "                free.insert(store::Earlier { id: row.id, request_hash: key.request_hash.to_vec() });\n",
        replace: "                let _ = free;\n",
        test: &["test", "--package", "e2e", "--test", "flow", "fifty_requests_with_one_key"],
        why: "a request that is repeated at once is answered with an error, and so is everybody in its batch",
    },
    Mutant {
        name: "repeated-request-keeps-its-place",
        file: "services/purchase/src/accept.rs",
        find: "zip(&is_new).filter(|(_, is_new)| **is_new);",
        replace: "zip(&is_new).filter(|_| true);",
        test: &["test", "--package", "e2e", "--test", "flow", "what_is_refused_for_want_of_room"],
        why: "each repeated request takes a place for ever, until all purchases are refused",
    },
    Mutant {
        name: "ended-purchase-keeps-its-place",
        file: "services/purchase/src/live/view.rs",
        find: "filter_map(|ended| self.close(ended.id)).collect();\n        \
               self.admission.leave(mine.into_iter());\n",
        replace: "filter_map(|ended| self.close(ended.id)).collect();\n        drop(mine);\n",
        test: &["test", "--package", "e2e", "--test", "flow", "what_is_refused_for_want_of_room"],
        why: "after as many purchases as may be under way at a time, all are refused",
    },
    Mutant {
        name: "given-up-purchase-keeps-its-place",
        file: "services/purchase/src/live/view.rs",
        find: "            mine.extend(self.close_keeping(*id));\n",
        replace: "            mine.extend(self.close_keeping(*id).filter(|_| *id == 0));\n",
        test: &["test", "--package", "e2e", "--test", "faults", "after_its_last_try"],
        why: "each purchase that is left to an operator takes a place for ever",
    },
    Mutant {
        name: "product-named-twice-counts-once",
        file: "services/purchase/src/model.rs",
        find: "*sum = sum.checked_add(amount).filter",
        replace: "*sum = Some(amount).filter",
        test: &["test", "--package", "e2e", "--test", "flow", "a_product_named_twice"],
        why: "a customer who names a product twice gets, and pays, less than was ordered",
    },
    Mutant {
        name: "end-is-told-before-it-is-written",
        file: "services/purchase/src/results.rs",
        find: "                    None => {\n                        \
                  seen.insert(reported.id, sorted.ended.len());\n",
        replace: "                    None => {\n                        \
                  sorted.open.push(Grown::to(reported.id, reported.path.clone()));\n                        \
                  seen.insert(reported.id, sorted.ended.len());\n",
        test: &["test", "--package", "e2e", "--test", "flow", "an_end_is_not_told_before_it_is_written"],
        why: "a customer hears of a success that the database does not know, and may never know",
    },
    Mutant {
        name: "purchase-ends-twice",
        file: "services/purchase/src/results.rs",
        find: "if *path == finish.path => Written::Before,",
        replace: "if *path == finish.path => Written::Finished { finished_no: number },",
        test: &["test", "--package", "e2e", "--test", "faults", "repeated_shuffled_and_lost"],
        why: "the last event of a purchase is told again after each resume, and another's is lost",
    },
    Mutant {
        name: "reconciler-tries-once",
        file: "services/purchase/src/store.rs",
        find: "WHERE o.id > ? AND o.state = 0 AND (o.next_wake_at",
        replace: "WHERE o.id > ? AND o.state = 0 AND o.tries = 0 AND (o.next_wake_at",
        test: &["test", "--package", "e2e", "--test", "faults", "purchases_survive_a_bus"],
        why: "a purchase whose messages are lost twice is never looked after again",
    },
    Mutant {
        name: "stream-reads-only-what-is-listed",
        file: "services/purchase/src/store.rs",
        find: "    if rest > 0 {\n        let after = numbers(tx)?",
        replace: "    if rest > limit {\n        let after = numbers(tx)?",
        test: &["test", "--package", "purchase"],
        why: "a client that resumes misses the latest purchases, which are not listed by customer yet",
    },
    Mutant {
        name: "cancelled-without-asking-the-pivot",
        file: "services/purchase/src/reconcile.rs",
        find: "(Mode::Decide, 0)",
        replace: "(Mode::Cancel, 0)",
        test: &["test", "--package", "e2e", "--test", "faults", "what_is_paid_before_the_deadline"],
        why: "a purchase that is paid is rolled back, or never ends",
    },
    Mutant {
        name: "shorter-path-replaces-the-longer",
        file: "services/purchase/src/live/view.rs",
        find: ".filter(|open| replies > open.replies)",
        replace: "",
        test: &["test", "--package", "e2e", "--test", "flow", "a_purchase_shows_how_far"],
        why: "a purchase goes back in time, for who looks and for who opens a stream",
    },
    Mutant {
        name: "place-in-the-stream-stays-before-the-end",
        file: "services/purchase/src/stream.rs",
        find: "if index + 1 == count => self.cursor.finish(id, number),",
        replace: "if index + 1 == count + 1 => self.cursor.finish(id, number),",
        test: &["test", "--package", "e2e", "--test", "flow", "a_stream_resumes_behind_every_event"],
        why: "after a resume a client is told again of purchases that have ended",
    },
    Mutant {
        name: "catching-up-skips-what-ended-meanwhile",
        file: "services/purchase/src/http.rs",
        find: "        Some(cursor) if cursor.finished() <= announced => cursor,",
        replace: "        Some(cursor) if cursor.finished() == announced => cursor,",
        test: &["test", "--package", "e2e", "--test", "flow", "a_stream_resumes_behind_every_event"],
        why: "a client that was away misses what ended meanwhile",
    },
    Mutant {
        name: "everybody-reads-every-stream",
        file: "services/purchase/src/live/view.rs",
        find: "self.streams.get_mut(&customer_id) else { return };",
        replace: "self.streams.values_mut().next() else { return };",
        test: &["test", "--package", "e2e", "--test", "flow", "nobody_sees_what_is_not_theirs"],
        why: "a customer is shown another's purchases",
    },
    Mutant {
        name: "full-queues-block-each-other",
        file: "crates/drive/src/frames.rs",
        find: "deliveries[*place].count < self.drop_after_deliveries);",
        replace: "deliveries[*place].count < u32::MAX);",
        test: &["test", "--package", "e2e", "--test", "flow", "full_of_each_other"],
        why: "two queues that are full of each other's answers stand still until the process is restarted",
    },
    Mutant {
        name: "report-of-another-definition-counts",
        file: "services/purchase/src/results.rs",
        find: "if (name, version) != (self.definition.name(), self.definition.version()) {",
        replace: "if name.is_empty() && version == 0 {",
        test: &["test", "--package", "e2e", "--test", "faults", "what_cannot_be_understood"],
        why: "another saga's report, or one of another version, is read as if it were a purchase's",
    },
    Mutant {
        name: "barrier-of-an-open-saga-is-forgotten",
        file: "services/purchase/src/reconcile.rs",
        find: "self.db.read(store::all_ended_below).await?;",
        replace: "self.db.read(store::all_ended_below).await?.max(u64::MAX >> 11);",
        test: &["test", "--package", "e2e", "--test", "faults", "barrier_rows_go"],
        why: "an operator's retry reserves the stock of a purchase for the second time",
    },
    Mutant {
        name: "late-news-open-what-has-ended",
        file: "services/purchase/src/live/view.rs",
        find: "ended.as_ref().is_none_or(|ended| ended.contains(&purchase.id))",
        replace: "ended.is_none()",
        test: &["test", "--package", "purchase", "live::tests::whatever"],
        why: "a purchase that has ended is told as begun, and never ends again",
    },
    Mutant {
        name: "moved-stream-begins-too-early",
        file: "services/purchase/src/http.rs",
        find: "    if cursor.finished() <= door.live.announced() {",
        replace: "    if cursor.finished() <= u64::MAX {",
        test: &["test", "--package", "e2e", "--test", "replicas", "a_stream_that_moves"],
        why: "a client that moves to another replica is told again of what has ended",
    },
    Mutant {
        name: "nobody-asks-which-number-was-the-last",
        file: "services/purchase/src/follow.rs",
        find: "if last > self.live.announced() {",
        replace: "if last > u64::MAX - 1 {",
        test: &["test", "--package", "e2e", "--test", "replicas", "on_a_file::what_ends_elsewhere"],
        why: "while Redis is away a replica fills up with purchases that have ended, until it refuses all",
    },
    Mutant {
        name: "start-takes-over-what-others-drive",
        file: "services/purchase/src/reconcile.rs",
        find: "if self.settings.replicas == Replicas::Many {",
        replace: "if self.settings.replicas == Replicas::Many && self.settings.max_tries == 0 {",
        test: &["test", "--package", "e2e", "--test", "replicas", "on_a_file::what_is_due"],
        why: "each start of a replica starts every purchase again, and counts what others count",
    },
    Mutant {
        name: "refused-start-counts-as-a-try",
        file: "services/purchase/src/reconcile.rs",
        find: "            self.db.write(put_back).await?;\n",
        replace: "            drop(put_back);\n",
        test: &["test", "--package", "purchase", "reconcile::"],
        why: "a broker that is away for twenty minutes leaves every purchase to an operator",
    },
    Mutant {
        name: "library-s-place-in-its-stream-is-not-read",
        file: "services/purchase/src/http.rs",
        find: "parameter(\"lastEventId\")",
        replace: "parameter(\"lastEventID\")",
        test: &["test", "--package", "sagaline", "--test", "api", "a_stream_resumes_behind_any_event"],
        why: "a front end whose connection breaks is told again of what ended a moment ago, and never of what ended before",
    },
];
