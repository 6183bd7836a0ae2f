//! When a fork is acted on, and when it is not.

use super::*;

/// A chain read to its head, escrow 1 announced and approved in block 2, and every message claimed.
struct Read {
    chain: Arc<Fake>,
    store: Arc<Store>,
    scanner: Scanner<Fake>,
    seen: BTreeMap<u64, Entry>,
}

impl Read {
    async fn with(settings: &[(&str, &str)]) -> Self {
        let chain = Fake::new(Some(64));
        chain.extend(&[], &[]);
        chain.extend(&[1], &[1]);
        let store = open_store();
        let mut scanner = scanner(&chain, &store, settings, Until::Forever);
        settle(&mut scanner).await;
        let mut read = Self { chain, store, scanner, seen: BTreeMap::new() };
        assert_eq!(read.standing(), 2);
        read
    }

    /// Messages published and not withdrawn.
    fn standing(&mut self) -> usize {
        let claimed = self.store.claim(usize::MAX).unwrap();
        self.seen.extend(claimed.into_iter().map(|it| (it.position, it.entry)));
        standing(&self.seen).values().map(Vec::len).sum()
    }

    /// Block 2 leaves the chain for another; another provider goes on to show the block that was there.
    fn fork_that_another_denies(&self) {
        let lost = self.chain.blocks.lock().unwrap()[2].header;
        *self.chain.other.lock().unwrap() = Some(Box::new(move |_, _| Ok(Answer::Header(Some(lost)))));
        self.fork();
    }

    fn fork(&self) {
        self.chain.drop_newest(1);
        (0..2).for_each(|_| self.chain.extend(&[], &[]));
    }

    async fn steps_for(&mut self, time: Duration) {
        let end = tokio::time::Instant::now() + time;
        while tokio::time::Instant::now() < end {
            match self.scanner.step().await.unwrap() {
                Step::Progress => {}
                Step::Wait(pause) => tokio::time::sleep(pause).await,
                Step::Idle => tokio::time::sleep(Duration::from_secs(4)).await,
                Step::Done => unreachable!("it has no end"),
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_fork_that_another_provider_denies_is_not_acted_on_and_that_provider_is_turned_to() {
    let mut read = Read::with(&[]).await;
    read.fork_that_another_denies();
    read.steps_for(Duration::from_secs(20)).await;
    assert_eq!(*read.chain.turned_away.lock().unwrap(), 0, "it may be the other that lags");
    read.steps_for(Duration::from_secs(20)).await;
    assert_eq!(*read.chain.turned_away.lock().unwrap(), 1);
    assert_eq!((read.standing(), read.store.cursor().unwrap().number), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_fork_that_another_provider_sees_a_little_later_is_acted_on_then() {
    let mut read = Read::with(&[]).await;
    read.fork_that_another_denies();
    read.steps_for(Duration::from_secs(5)).await;
    assert_eq!(read.standing(), 2);
    *read.chain.other.lock().unwrap() = Some(Box::new(|chain, call| chain.answer(call)));
    read.steps_for(Duration::from_secs(5)).await;
    assert_eq!((read.standing(), *read.chain.turned_away.lock().unwrap()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn other_providers_that_say_nothing_are_waited_for_but_not_for_ever() {
    type Silence = fn() -> Result<Answer, Refused>;
    let silences: [Silence; 2] = [|| Ok(Answer::Header(None)), || Err(Refused::Slow("no answer".into()))];
    for silence in silences {
        let mut read = Read::with(&[]).await;
        *read.chain.other.lock().unwrap() = Some(Box::new(move |_, _| silence()));
        read.fork();
        read.steps_for(Duration::from_secs(20)).await;
        assert_eq!(read.standing(), 2);
        read.steps_for(Duration::from_secs(20)).await;
        assert_eq!((read.standing(), *read.chain.turned_away.lock().unwrap()), (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_fork_that_would_withdraw_too_much_stops_reading_until_it_passes() {
    let mut read = Read::with(&[("chain.max_retractions_per_minute", "1")]).await;
    let original = read.chain.blocks.lock().unwrap().clone();
    read.fork();
    read.steps_for(Duration::from_secs(300)).await;
    assert_eq!((read.standing(), read.store.cursor().unwrap().number), (2, 2), "two is more than one");
    assert!(read.scanner.vitals.now_known().retractions_stopped);
    // The chain is again what it was.
    *read.chain.blocks.lock().unwrap() = original;
    read.chain.extend(&[], &[1]);
    read.steps_for(Duration::from_secs(5)).await;
    assert_eq!((read.standing(), read.store.cursor().unwrap().number), (3, 3));
    assert!(!read.scanner.vitals.now_known().retractions_stopped);
}

#[tokio::test(start_paused = true)]
async fn forks_in_a_row_withdraw_no_more_within_a_minute_than_they_may() {
    let mut read = Read::with(&[("chain.max_retractions_per_minute", "3")]).await;
    read.chain.drop_newest(1);
    (0..2).for_each(|_| read.chain.extend(&[2], &[2]));
    read.steps_for(Duration::from_secs(5)).await;
    assert_eq!(
        read.standing(),
        4,
        "two withdrawn, four others published: the second announcement is a repeat"
    );
    read.chain.drop_newest(1);
    (0..2).for_each(|_| read.chain.extend(&[], &[]));
    read.steps_for(Duration::from_secs(30)).await;
    assert_eq!(read.standing(), 4, "the cap is reached for now");
    read.steps_for(Duration::from_secs(60)).await;
    assert_eq!(read.standing(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_goes_on_contradicting_itself_is_asked_less_and_less_and_another_instead() {
    let mut read = Read::with(&[]).await;
    read.chain.extend(&[], &[1]);
    read.chain.forget();
    read.scanner.poll(3).await.unwrap();
    read.chain.extend(&[], &[1]);
    read.scanner.poll(3).await.unwrap();
    // The head is known, the block before it never comes.
    *read.chain.hidden.lock().unwrap() = Some(3);
    read.scanner.recent.remove(&3);
    read.steps_for(Duration::from_secs(60)).await;
    let asked = read.chain.asked().len();
    assert!(*read.chain.turned_away.lock().unwrap() >= 2);
    assert!(asked < 150, "{asked} requests in a minute");
    *read.chain.hidden.lock().unwrap() = None;
    read.steps_for(Duration::from_secs(8)).await;
    assert_eq!((read.standing(), read.scanner.looks), (4, 0));
}
