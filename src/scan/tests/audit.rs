//! What a node left out without a word is found when it is read again.

use super::late::net;
use super::*;

const FINALITY: u64 = 4;

/// A relay whose auditor has calls enough.
struct Audited {
    chain: Arc<Fake>,
    store: Arc<Store>,
    scanner: Scanner<Fake>,
    auditor: Auditor<Fake>,
    seen: BTreeMap<u64, Entry>,
}

impl Audited {
    fn new(chain: Arc<Fake>) -> Self {
        let settings = [
            ("audit.calls_per_hour", "1000000000"),
            ("factory.count_call", "count()"),
            ("escrow.count_calls", "Approved = count()"),
        ];
        let (store, config) = (open_store(), config(&settings));
        let scanner = scanner(&chain, &store, &settings, Until::Forever);
        let signatures = Arc::new(crate::signatures(&config).unwrap());
        let auditor = Auditor::new(Arc::clone(&chain), Arc::clone(&store), signatures, &config).unwrap();
        Self { chain, store, scanner, auditor, seen: BTreeMap::new() }
    }

    async fn read(&mut self) {
        loop {
            settle(&mut self.scanner).await;
            match self.scanner.step_late().await.unwrap() {
                Step::Idle if self.store.late_read().is_none() => break,
                Step::Wait(pause) => tokio::time::sleep(pause).await,
                Step::Idle | Step::Progress | Step::Done => {}
            }
        }
        self.seen.extend(self.store.claim(usize::MAX).unwrap().into_iter().map(|it| (it.position, it.entry)));
    }

    /// Reads on until all that was read so far is final; audits so many steps, and reads what that brings.
    async fn finish(&mut self, steps: usize) {
        (0..=FINALITY).for_each(|_| self.chain.extend(&[], &[]));
        // The finalized head is asked for again only after many blocks.
        self.scanner.finality.asked_at = None;
        self.read().await;
        for _ in 0..steps {
            match self.auditor.step().await.unwrap() {
                Step::Progress => self.read().await,
                Step::Idle | Step::Done => tokio::time::sleep(Duration::from_millis(1)).await,
                Step::Wait(pause) => tokio::time::sleep(pause).await,
            }
        }
    }

    /// Whether it is marked as late, of each message.
    fn late(&self) -> Vec<bool> {
        self.seen.values().map(|entry| entry.late).collect()
    }

    fn standing(&self) -> usize {
        net(&self.seen).values().map(BTreeSet::len).sum()
    }

    fn leave_out(&self, logs: impl Fn(&Log, Span) -> bool + Send + 'static) {
        *self.chain.left_out.lock().unwrap() = Some(Box::new(logs));
    }

    fn tell_all(&self) {
        *self.chain.left_out.lock().unwrap() = None;
    }
}

fn by_hash(span: Span) -> bool {
    matches!(span, Span::Block(_))
}

#[tokio::test(start_paused = true)]
async fn an_event_left_out_near_the_head_comes_late_once_its_block_is_final() {
    let mut relay = Audited::new(Fake::new(Some(FINALITY)));
    relay.chain.extend(&[1], &[1]);
    relay.read().await;
    relay.leave_out(|log, _| log.block.number == 2 && log.log_index == 0);
    relay.chain.extend(&[], &[1, 1]);
    relay.read().await;
    assert_eq!(relay.standing(), 3);
    relay.tell_all();
    relay.finish(5).await;
    assert_eq!((relay.standing(), relay.late()), (4, vec![false, false, false, true]));
    relay.finish(5).await;
    assert_eq!(relay.standing(), 4, "once");
}

#[tokio::test(start_paused = true)]
async fn an_announcement_left_out_brings_the_escrows_whole_history_late() {
    let mut relay = Audited::new(Fake::new(Some(FINALITY)));
    relay.read().await;
    relay.leave_out(|log, _| log.address == FACTORY);
    relay.chain.extend(&[1], &[1]);
    (0..3).for_each(|_| relay.chain.extend(&[], &[1]));
    relay.read().await;
    assert_eq!(relay.standing(), 0);
    relay.tell_all();
    relay.finish(5).await;
    assert_eq!((relay.standing(), relay.late()), (5, vec![true; 5]));
    assert_eq!(relay.seen[&0].sequence, 1);
    assert!(relay.seen[&0].announces, "the announcement first");
    relay.chain.extend(&[], &[1]);
    relay.read().await;
    assert_eq!(relay.late().last(), Some(&false), "from then on it is watched");
}

#[tokio::test(start_paused = true)]
async fn an_event_left_out_of_a_final_range_is_found_by_lot() {
    let chain = Fake::new(Some(FINALITY));
    chain.extend(&[1], &[]);
    (0..20).for_each(|_| chain.extend(&[], &[1]));
    let mut relay = Audited::new(chain);
    relay.leave_out(|log, span| log.block.number == 7 && !by_hash(span));
    relay.read().await;
    assert_eq!(relay.standing(), 20);
    relay.finish(2000).await;
    assert_eq!(relay.standing(), 21, "by hash it is told of, and a range is not asked again");
    assert_eq!(relay.late().iter().filter(|late| **late).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_is_not_seen_twice_is_not_published_and_what_is_not_found_again_is_not_withdrawn() {
    let mut relay = Audited::new(Fake::new(Some(FINALITY)));
    relay.chain.extend(&[1], &[1]);
    relay.leave_out(|log, span| log.block.number == 2 && by_hash(span));
    relay.chain.extend(&[], &[1]);
    relay.read().await;
    assert_eq!(relay.standing(), 2, "block 2 was read by hash, and its log was left out");
    relay.finish(5).await;
    assert_eq!(relay.standing(), 2, "by range it is told of, by hash it is not");
    relay.leave_out(|log, span| log.block.number == 1 || log.block.number == 2 && by_hash(span));
    relay.finish(20).await;
    assert_eq!(relay.standing(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_event_that_another_provider_has_under_another_index_is_not_published_again() {
    let mut relay = Audited::new(Fake::new(Some(FINALITY)));
    relay.chain.extend(&[1], &[1]);
    relay.read().await;
    *relay.chain.other.lock().unwrap() = Some(Box::new(|chain, call| {
        Ok(match chain.answer(call)? {
            Answer::Logs(logs) => Answer::Logs(
                logs.into_iter().map(|log| Log { log_index: log.log_index + 5, ..log }).collect(),
            ),
            other => other,
        })
    }));
    relay.finish(20).await;
    assert_eq!((relay.standing(), relay.late()), (2, vec![false, false]));
}

#[tokio::test(start_paused = true)]
async fn a_provider_of_another_fork_and_one_that_refuses_are_not_believed_and_asked_less() {
    let mut relay = Audited::new(Fake::new(Some(FINALITY)));
    relay.chain.extend(&[1], &[1]);
    relay.read().await;
    let fork = Fake::new(Some(FINALITY));
    *fork.salt.lock().unwrap() = 1000;
    (0..20).for_each(|_| fork.extend(&[1], &[1, 1]));
    *relay.chain.other.lock().unwrap() = Some(Box::new(move |_, call| fork.answer(call)));
    relay.finish(20).await;
    assert_eq!(relay.standing(), 2);

    let few = |call: &Call| match call {
        Call::Logs(LogFilter { span: Span::Range(range), addresses, .. }) => {
            range.blocks() <= 2 && addresses.len() <= 1
        }
        _ => true,
    };
    relay.leave_out(|log, _| log.block.number == 7);
    (0..3).for_each(|_| relay.chain.extend(&[], &[1]));
    relay.read().await;
    relay.tell_all();
    *relay.chain.other.lock().unwrap() = Some(Box::new(move |chain, call| match few(call) {
        true => chain.answer(call),
        false => Err(Refused::Unknown("the moon".into())),
    }));
    let before = relay.standing();
    relay.finish(100).await;
    assert!(before < relay.standing(), "{before} stood before, {} after", relay.standing());
    assert_eq!(relay.store.unaudited(100).unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn after_an_outage_as_much_is_asked_for_at_once_as_before() {
    let mut relay = Audited::new(Fake::new(Some(FINALITY)));
    relay.chain.extend(&[1], &[1]);
    relay.read().await;
    *relay.chain.other.lock().unwrap() = Some(Box::new(|_, _| Err(Refused::Unknown("gone".into()))));
    for _ in 0..10 {
        relay.chain.extend(&[], &[1]);
        relay.read().await;
    }
    relay.finish(60).await;
    *relay.chain.other.lock().unwrap() = Some(Box::new(|chain, call| chain.answer(call)));
    for _ in 0..100 {
        (0..FINALITY).for_each(|_| relay.chain.extend(&[], &[]));
        relay.read().await;
    }
    relay.finish(40).await;
    assert_eq!(relay.store.unaudited(1000).unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn the_contracts_own_counts_are_compared_at_a_final_block() {
    let mut relay = Audited::new(Fake::new(Some(FINALITY)));
    relay.chain.extend(&[1], &[1]);
    relay.read().await;
    *relay.chain.counted.lock().unwrap() = 1;
    relay.finish(5).await;
    assert!(!relay.auditor.said.escrows && relay.auditor.said.counts.is_empty());
    *relay.chain.counted.lock().unwrap() = 2;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    relay.finish(5).await;
    assert!(relay.auditor.said.escrows, "the factory has 2 and the registry 1");
    assert_eq!(relay.auditor.said.counts, BTreeSet::from([escrow(1)]), "2 approvals and 1 relayed");
}

#[derive(Clone, Debug)]
enum Happening {
    Block(Vec<u8>, Vec<u8>),
    LeaveOut(u64),
    TellAll,
    Fork(usize),
    Read,
    Audit,
}

fn happenings() -> impl Strategy<Value = Happening> {
    let few = || prop::collection::vec(1u8..5, 0..3);
    prop_oneof![
        6 => (few(), few()).prop_map(|(announced, approved)| Happening::Block(announced, approved)),
        2 => (2u64..5).prop_map(Happening::LeaveOut),
        1 => Just(Happening::TellAll),
        1 => (1usize..4).prop_map(Happening::Fork),
        4 => Just(Happening::Read),
        2 => Just(Happening::Audit),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Whatever was left out while it was read, through forks: when all blocks were read again, what stands is the chain.
    #[test]
    fn whatever_was_left_out_of_unfinal_blocks_stands_in_the_end(
        steps in prop::collection::vec(happenings(), 1..40)
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut relay = Audited::new(Fake::new(Some(FINALITY)));
            relay.read().await;
            for step in steps {
                match step {
                    Happening::Block(announced, approved) => relay.chain.extend(&announced, &approved),
                    // Each nth log; by hash only, as the audit reads by range and the reader near the head by hash.
                    Happening::LeaveOut(nth) => {
                        relay.leave_out(move |log, span| by_hash(span) && (log.block.number + log.log_index) % nth == 0)
                    }
                    Happening::TellAll => relay.tell_all(),
                    Happening::Fork(depth) => {
                        relay.chain.drop_newest(depth);
                        (0..=depth).for_each(|_| relay.chain.extend(&[], &[2]));
                    }
                    Happening::Read => relay.read().await,
                    Happening::Audit => drop(relay.auditor.step().await.unwrap()),
                }
                // No block becomes final before it was read: by range nothing is left out, and nothing would be found.
                relay.read().await;
            }
            relay.tell_all();
            relay.finish(30).await;
            let honest = Audited::new(Arc::clone(&relay.chain));
            let mut honest = honest;
            honest.read().await;
            assert_eq!(net(&relay.seen), net(&honest.seen));
        });
    }
}
