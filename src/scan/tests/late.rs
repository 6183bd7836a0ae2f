//! What is read late, against a model: a chain that grows and forks, events of signatures the store learns of in the
//! middle of it, and escrows that somebody imports.

use tempfile::TempDir;

use super::*;

const MADE: &str = "EscrowMade(address indexed escrow)";
const RELEASED: &str = "Released(address indexed by)";
/// Escrows with higher numbers are never announced.
const ANNOUNCED: u8 = 6;

/// One thing that happens to a chain and its relay.
#[derive(Clone, Debug)]
enum Happening {
    /// Announced in the old way, in the new way, approved, released.
    Grow(Vec<u8>, Vec<u8>, Vec<u8>, Vec<u8>),
    Fork(usize, usize),
    Steps(usize),
    LateSteps(usize),
    Claim,
    /// From here on the configuration has the new signatures.
    Learn,
    /// Which, and how many blocks before the next one to read.
    Import(u8, u64),
    Restart,
}

fn happenings() -> impl Strategy<Value = Happening> {
    let few = |upto: u8| prop::collection::vec(1..upto, 0..2);
    let numbers = || prop::collection::vec(1u8..9, 0..3);
    prop_oneof![
        6 => (few(ANNOUNCED), few(ANNOUNCED), numbers(), numbers())
            .prop_map(|(old, new, approved, released)| Happening::Grow(old, new, approved, released)),
        2 => (1usize..5, 0usize..6).prop_map(|(depth, grown)| Happening::Fork(depth, grown)),
        4 => (1usize..8).prop_map(Happening::Steps),
        3 => (1usize..4).prop_map(Happening::LateSteps),
        2 => Just(Happening::Claim),
        1 => Just(Happening::Learn),
        1 => (ANNOUNCED..9, 0u64..12).prop_map(|(number, back)| Happening::Import(number, back)),
        1 => Just(Happening::Restart),
    ]
}

/// A relay on a file, so that it can be opened with another configuration.
struct Relay {
    chain: Arc<Fake>,
    folder: TempDir,
    learnt: bool,
    settings: Vec<(&'static str, &'static str)>,
    running: Option<(Arc<Store>, Scanner<Fake>)>,
}

impl Relay {
    async fn restart(&mut self) {
        if let Some((store, scanner)) = self.running.take() {
            drop(scanner);
            // What it had under way ends when its turn comes.
            while Arc::strong_count(&store) > 1 {
                tokio::task::yield_now().await;
            }
        }
        let mut settings = self.settings.clone();
        let (made, released) = (format!("[{DEPLOYED:?}, {MADE:?}]"), format!("[{APPROVED:?}, {RELEASED:?}]"));
        if self.learnt {
            settings.extend([("factory.events", &*made.leak()), ("escrow.events", &*released.leak())]);
        }
        let config = config(&settings);
        let signatures = crate::signatures(&config).unwrap();
        let path = self.folder.path().join("relayer.redb");
        let identity = crate::identity(&config, &signatures);
        let store = Arc::new(Store::open(&path, identity, Some(0), Added::Read).unwrap());
        let chain = Arc::clone(&self.chain);
        let scanner = Scanner::new(chain, Arc::clone(&store), Arc::new(signatures), &config, Until::Forever);
        self.running = Some((store, scanner));
    }

    fn parts(&mut self) -> (&Arc<Store>, &mut Scanner<Fake>) {
        let (store, scanner) = self.running.as_mut().unwrap();
        (store, scanner)
    }

    /// Steps until nothing is left to read, late or not.
    async fn settle(&mut self) {
        for _ in 0..1000 {
            let (store, scanner) = self.parts();
            settle(scanner).await;
            match scanner.step_late().await.unwrap() {
                Step::Idle if store.late_read().is_none() => return,
                Step::Wait(pause) => tokio::time::sleep(pause).await,
                Step::Idle | Step::Progress | Step::Done => {}
            }
        }
        panic!("late reading never ends");
    }
}

/// A relay that has read this chain, with escrow 1 archived, and then learns of the new signatures.
async fn learns_after_the_end(chain: Arc<Fake>) -> BTreeMap<u64, Entry> {
    let settings = vec![
        ("escrow.terminal", "Approved"),
        ("escrow.archive_after", "1"),
        ("rpc.filter", "addresses"),
        ("rpc.max_range", "2"),
    ];
    (0..20).for_each(|_| chain.extend(&[], &[]));
    let folder = tempfile::tempdir().unwrap();
    let mut relay = Relay { chain, folder, learnt: false, settings, running: None };
    relay.restart().await;
    relay.settle().await;
    let store = relay.parts().0;
    assert_eq!((store.registry().len(), store.registry().watched_len()), (1, 0));
    relay.learnt = true;
    relay.restart().await;
    relay.settle().await;
    let mut seen = BTreeMap::new();
    relay.restart_reading_all(&mut seen);
    seen
}

#[tokio::test(start_paused = true)]
async fn the_history_of_archived_escrows_is_read_for_an_added_signature_too() {
    let chain = Fake::new(Some(4));
    chain.extend_with(&[(FACTORY, DEPLOYED, 1)]);
    chain.extend_with(&[(escrow(1), RELEASED, 1)]);
    chain.extend_with(&[(escrow(1), APPROVED, 1)]);
    let seen = learns_after_the_end(chain).await;
    assert_eq!(net(&seen).values().map(BTreeSet::len).sum::<usize>(), 3, "announced, approved, and released");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_behind_says_nothing_of_how_to_ask() {
    let chain = Fake::new(Some(64));
    (0..5).for_each(|_| chain.extend(&[], &[7]));
    let store = open_store();
    let mut reader = scanner(&chain, &store, &[("rpc.max_addresses", "2")], Until::Forever);
    settle(&mut reader).await;
    store.import(&(1..=9).map(escrow).collect::<Vec<_>>(), 2).unwrap();
    chain.refusals.lock().unwrap().push_back(Refused::Behind("unknown block".into()));
    reader.step_late().await.unwrap();
    assert!(reader.limits.everyone() > 0);
    while store.late_read().is_some() {
        reader.step_late().await.unwrap();
    }
    assert_eq!(entries(&store).len(), 4);
}

/// Per escrow the events published and not withdrawn. What is late has no place in the order.
pub(super) fn net(entries: &BTreeMap<u64, Entry>) -> BTreeMap<Address, BTreeSet<(u64, B256, u64)>> {
    let mut lanes: BTreeMap<Address, BTreeSet<(u64, B256, u64)>> = BTreeMap::new();
    for entry in entries.values() {
        let event = (entry.block_number, entry.block_hash, entry.log_index);
        let lane = lanes.entry(entry.escrow).or_default();
        let changed = match entry.kind {
            Kind::Event => lane.insert(event),
            Kind::Retraction { .. } => lane.remove(&event),
        };
        assert!(changed, "once published, once withdrawn: {event:?}");
    }
    lanes.retain(|_, lane| !lane.is_empty());
    lanes
}

/// A late read by range meets a fork that the scanner has not seen yet, where another log was accepted.
#[tokio::test(start_paused = true)]
async fn what_a_fork_nobody_has_seen_yet_announces_in_the_place_of_another_log_is_not_registered() {
    let chain = Fake::new(Some(8));
    chain.extend_with(&[]);
    chain.extend_with(&[(FACTORY, DEPLOYED, 4)]);
    let settings = vec![("chain.reading", "ranged")];
    let folder = tempfile::tempdir().unwrap();
    let mut relay = Relay { chain: Arc::clone(&chain), folder, learnt: false, settings, running: None };
    relay.restart().await;
    settle(relay.parts().1).await;
    relay.learnt = true;
    relay.restart().await;
    chain.extend_with(&[]);
    settle(relay.parts().1).await;
    chain.drop_newest(2);
    chain.extend_with(&[(FACTORY, MADE, 1)]);
    for _ in 0..3 {
        relay.parts().1.step_late().await.unwrap();
    }
    chain.drop_newest(1);
    (0..8).for_each(|_| chain.extend(&[], &[]));
    relay.settle().await;
    assert_eq!(relay.parts().0.registry().len(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Whatever happens: what stands in the end is what a relay would have that knew everything from the beginning.
    #[test]
    fn signatures_learnt_and_escrows_imported_bring_their_whole_history_once_through_forks_and_restarts(
        script in prop::collection::vec(happenings(), 1..40),
        ranged in any::<bool>(),
        small in any::<bool>(),
        leaps in leaps(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let settings = vec![
                ("chain.reading", if ranged { "ranged" } else { "linked" }),
                ("rpc.max_range", if small { "2" } else { "100" }),
                ("rpc.max_addresses", if small { "2" } else { "1000" }),
            ];
            let chain = Fake::new(Some(8));
            (0..3).for_each(|_| chain.extend(&[], &[]));
            let folder = tempfile::tempdir().unwrap();
            let mut relay = Relay { chain: Arc::clone(&chain), folder, learnt: false, settings, running: None };
            relay.restart().await;
            let mut seen: BTreeMap<u64, Entry> = BTreeMap::new();
            let mut imported: BTreeMap<Address, u64> = BTreeMap::new();
            for (place, happening) in script.into_iter().enumerate() {
                for number in leap(&leaps, place) {
                    chain.extend_with(&[(FACTORY, DEPLOYED, number), (escrow(number), APPROVED, number), (escrow(7), RELEASED, 7)]);
                }
                match happening {
                    Happening::Grow(old, new, approved, released) => {
                        let old = old.iter().map(|it| (FACTORY, DEPLOYED, *it));
                        let new = new.iter().map(|it| (FACTORY, MADE, *it));
                        let approved = approved.iter().map(|it| (escrow(*it), APPROVED, *it));
                        let released = released.iter().map(|it| (escrow(*it), RELEASED, *it));
                        chain.extend_with(&Vec::from_iter(old.chain(new).chain(approved).chain(released)));
                    }
                    Happening::Fork(depth, grown) => {
                        chain.drop_newest(depth);
                        for _ in 0..grown {
                            chain.extend_with(&[(FACTORY, MADE, 5), (escrow(5), APPROVED, 5), (escrow(7), RELEASED, 7)]);
                        }
                    }
                    Happening::Steps(count) => {
                        for _ in 0..count {
                            relay.parts().1.step().await.unwrap();
                        }
                    }
                    Happening::LateSteps(count) => {
                        for _ in 0..count {
                            relay.parts().1.step_late().await.unwrap();
                        }
                    }
                    Happening::Claim => {
                        let claimed = relay.parts().0.claim(usize::MAX).unwrap();
                        seen.extend(claimed.into_iter().map(|it| (it.position, it.entry)));
                    }
                    Happening::Learn => {
                        relay.learnt = true;
                        relay.restart().await;
                    }
                    Happening::Import(number, back) => {
                        let (store, _) = relay.parts();
                        let from = store.next_block().saturating_sub(back);
                        store.import(&[escrow(number)], from).unwrap();
                        imported.entry(escrow(number)).or_insert(from);
                    }
                    Happening::Restart => relay.restart().await,
                }
            }
            // Beyond what could look like a lagging node.
            (0..8).for_each(|_| chain.extend(&[], &[]));
            for _ in 0..3 {
                relay.settle().await;
            }
            let (store, _) = relay.parts();
            let store = Arc::clone(store);
            relay.restart_reading_all(&mut seen);
            let blocks = chain.blocks.lock().unwrap();
            let signature = |text: &str| AbiEvent::parse(text).unwrap().selector();
            let known = if relay.learnt { vec![DEPLOYED, MADE, APPROVED, RELEASED] } else { vec![DEPLOYED, APPROVED] };
            let known: Vec<B256> = known.into_iter().map(signature).collect();
            let mut since: BTreeMap<Address, u64> = imported.clone();
            let mut truth: BTreeMap<Address, BTreeSet<(u64, B256, u64)>> = BTreeMap::new();
            for block in blocks.iter() {
                let logs: Vec<&Log> = block.logs.iter().filter(|log| known.contains(&log.topics[0])).collect();
                let number = block.header.block.number;
                for log in logs.iter().filter(|log| log.address == FACTORY) {
                    since.entry(Address::from_word(log.topics[1])).or_insert(number);
                }
                for log in logs {
                    let of = if log.address == FACTORY { Address::from_word(log.topics[1]) } else { log.address };
                    if since.get(&of).is_some_and(|since| *since <= number) {
                        truth.entry(of).or_default().insert((number, log.block.hash, log.log_index));
                    }
                }
            }
            assert_eq!(net(&seen), truth);
            let watched: BTreeSet<Address> = store.registry().watched().collect();
            assert_eq!(watched, since.keys().copied().collect());
            let mut sequences: BTreeMap<Address, u64> = BTreeMap::new();
            for entry in seen.values() {
                let last = sequences.entry(entry.escrow).or_default();
                assert_eq!(entry.sequence, *last + 1, "sequence of {}", entry.escrow);
                *last = entry.sequence;
            }
        });
    }
}

impl Relay {
    /// What is in the store and was not claimed so far.
    fn restart_reading_all(&mut self, seen: &mut BTreeMap<u64, Entry>) {
        let claimed = self.parts().0.claim(usize::MAX).unwrap();
        seen.extend(claimed.into_iter().map(|it| (it.position, it.entry)));
    }
}
