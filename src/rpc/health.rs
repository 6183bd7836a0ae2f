//! How each provider is doing, and whom to ask next.
//!
//! A provider that fails is left alone for growing pauses, each its own; meanwhile the next one is asked. Where several
//! are configured, one that failed comes back after it answered [`watch`](super::watch), not at the cost of what is being
//! read. While none answers, one attempt is made at a time.

use std::sync::{Mutex, MutexGuard as StdGuard};
use std::time::Duration;

use tokio::sync::MutexGuard;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::backoff::Backoff;
use crate::config::SecretUrl;
use crate::telemetry::metrics;

/// A provider's hint is not taken for less than this.
const SHORTEST_HINT: Duration = Duration::from_millis(200);
/// Where another can be asked, one that kept us waiting is left alone for so many times as long.
const LEFT_ALONE: u32 = 10;
/// Blocks that a provider may be behind another one asked at the same time.
const MAX_LAG: u64 = 5;

pub(super) struct Health {
    providers: Mutex<Vec<Provider>>,
    /// Held by the one attempt made while nobody answers.
    turn: tokio::sync::Mutex<()>,
}

struct Provider {
    url: SecretUrl,
    /// On another chain: never asked again.
    wrong: bool,
    trouble: Option<Trouble>,
    /// It answers, but others are to be asked first until then.
    rests_until: Option<Instant>,
    /// How often in a row it was found to be behind the others.
    behind: u32,
    /// By how many blocks, when they were compared last.
    lag: u64,
}

/// How a provider is doing, to be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProviderState {
    /// Its URL as it may be shown: without path, query and user.
    pub url: String,
    /// It answers, as far as is known.
    pub answers: bool,
    /// For how long it has not.
    pub silent_for: Option<Duration>,
    /// It serves another chain, and is not asked.
    pub wrong_chain: bool,
    /// Blocks it was behind another one when they were compared last.
    pub lag: u64,
}

struct Trouble {
    since: Instant,
    until: Instant,
    backoff: Backoff,
}

impl Provider {
    /// It lags for good, and not because of a moment.
    fn lags(&self) -> bool {
        self.behind >= 2
    }

    fn is_first_choice(&self, now: Instant) -> bool {
        self.is_usable() && !self.lags() && self.rests_until.is_none_or(|until| until <= now)
    }

    fn is_usable(&self) -> bool {
        !self.wrong && self.trouble.is_none()
    }
}

impl Health {
    pub fn new(urls: &[SecretUrl]) -> Self {
        let provider = |url: &SecretUrl| Provider {
            url: url.clone(),
            wrong: false,
            trouble: None,
            rests_until: None,
            behind: 0,
            lag: 0,
        };
        for index in 0..urls.len() {
            metrics::provider_answers(index, true);
            metrics::provider_lag(index, 0);
        }
        Self { providers: Mutex::new(urls.iter().map(provider).collect()), turn: tokio::sync::Mutex::new(()) }
    }

    /// Whom to ask. Passes at once while anybody answers; else one caller at a time, each after a pause.
    pub async fn enter(&self) -> (usize, Option<MutexGuard<'_, ()>>) {
        if let Some(provider) = self.choose() {
            return (provider, None);
        }
        let turn = self.turn.lock().await;
        match self.choose() {
            Some(provider) => (provider, Some(turn)),
            None => {
                let (provider, until) = self.first_to_try();
                tokio::time::sleep_until(until).await;
                // Meanwhile another may have answered.
                (self.choose().unwrap_or(provider), Some(turn))
            }
        }
    }

    /// Whom to ask; `None` while nobody answers.
    pub fn choose(&self) -> Option<usize> {
        let (now, providers) = (Instant::now(), self.lock());
        let first = providers.iter().position(|provider| provider.is_first_choice(now));
        let chosen = first.or_else(|| {
            // The one whose rest is over first.
            let usable = providers.iter().enumerate().filter(|(_, provider)| provider.is_usable());
            usable.min_by_key(|(_, provider)| provider.rests_until).map(|(index, _)| index)
        });
        metrics::provider_in_use(chosen.unwrap_or(0));
        chosen
    }

    fn first_to_try(&self) -> (usize, Instant) {
        let providers = self.lock();
        let right = providers.iter().enumerate().filter(|(_, provider)| !provider.wrong);
        let pauses =
            right.filter_map(|(index, it)| it.trouble.as_ref().map(|trouble| (index, trouble.until)));
        pauses.min_by_key(|(_, until)| *until).unwrap_or((0, Instant::now()))
    }

    /// Providers on our chain other than this one, best first, without those that are left alone now.
    pub fn others(&self, than: usize) -> Vec<usize> {
        let (now, providers) = (Instant::now(), self.lock());
        let other = |(index, it): &(usize, &Provider)| {
            *index != than && !it.wrong && it.trouble.as_ref().is_none_or(|trouble| trouble.until <= now)
        };
        let mut others: Vec<(usize, &Provider)> = providers.iter().enumerate().filter(other).collect();
        others.sort_by_key(|(_, provider)| !provider.is_first_choice(now));
        others.into_iter().map(|(index, _)| index).collect()
    }

    /// An attempt failed in a way that waiting may mend. `hint`: how long the provider asks to be left alone; `took`: how
    /// long it kept us waiting.
    pub fn failed(&self, index: usize, reason: &str, hint: Option<Duration>, took: Duration) {
        let now = Instant::now();
        let mut providers = self.lock();
        let another = providers.iter().enumerate().any(|(other, it)| other != index && it.is_usable());
        let Provider { url, trouble, .. } = &mut providers[index];
        let trouble = trouble.get_or_insert_with(|| {
            let then = if another { "asking another" } else { "waiting, then trying again" };
            warn!(provider = %url, %reason, "The RPC provider does not answer: {then}");
            metrics::provider_answers(index, false);
            Trouble { since: now, until: now, backoff: Backoff::growing() }
        });
        // Several requests under way fail together: that is one step of the backoff, not several.
        if trouble.until <= now {
            let pause = trouble.backoff.pause();
            let alone = if another { took * LEFT_ALONE } else { Duration::ZERO };
            trouble.until = now + hint.map_or(pause.max(alone), |hint| hint.max(SHORTEST_HINT));
        }
    }

    /// An attempt was answered.
    pub fn succeeded(&self, index: usize) {
        let mut providers = self.lock();
        let Provider { url, trouble, .. } = &mut providers[index];
        if let Some(trouble) = trouble.take() {
            let seconds = trouble.since.elapsed().as_secs_f64();
            info!(provider = %url, seconds, "The RPC provider answers again after {seconds:.1} s");
            metrics::provider_answers(index, true);
        }
    }

    /// Others are asked first for so long, where there are others.
    pub fn rest(&self, index: usize, pause: Duration) {
        self.lock()[index].rests_until = Some(Instant::now() + pause);
    }

    /// It is on another chain. `true`: so are all.
    pub fn is_wrong(&self, index: usize) -> (bool, bool) {
        let mut providers = self.lock();
        let newly = !std::mem::replace(&mut providers[index].wrong, true);
        (newly, providers.iter().all(|provider| provider.wrong))
    }

    /// Whether it is known to be on another chain.
    pub fn is_on_another_chain(&self, index: usize) -> bool {
        self.lock()[index].wrong
    }

    /// Whether somebody else can be asked instead of these.
    pub fn has_other_than(&self, tried: &[usize]) -> bool {
        self.lock().iter().enumerate().any(|(index, it)| !tried.contains(&index) && it.is_usable())
    }

    /// How all of them are doing.
    pub fn states(&self) -> Vec<ProviderState> {
        let state = |it: &Provider| ProviderState {
            url: it.url.to_string(),
            answers: it.is_usable(),
            silent_for: it.trouble.as_ref().map(|trouble| trouble.since.elapsed()),
            wrong_chain: it.wrong,
            lag: it.lag,
        };
        self.lock().iter().map(state).collect()
    }

    /// Providers to look at: those that are not left alone.
    pub fn to_look_at(&self) -> Vec<usize> {
        self.others(usize::MAX)
    }

    pub fn is_failing(&self, index: usize) -> bool {
        self.lock()[index].trouble.is_some()
    }

    /// Heads told at the same time, by provider.
    pub fn heads(&self, heads: &[(usize, u64)]) {
        let Some(highest) = heads.iter().map(|(_, head)| *head).max() else {
            return;
        };
        let mut providers = self.lock();
        for &(index, head) in heads {
            let (lag, provider) = (highest - head, &mut providers[index]);
            metrics::provider_lag(index, lag);
            provider.lag = lag;
            let lagged = provider.lags();
            provider.behind = if lag > MAX_LAG { provider.behind + 1 } else { 0 };
            let url = &provider.url;
            match (lagged, provider.lags()) {
                (false, true) => {
                    warn!(provider = %url, lag, "The RPC provider is {lag} blocks behind another: that one is asked")
                }
                (true, false) => info!(provider = %url, "The RPC provider is behind no more"),
                (false, false) | (true, true) => {}
            }
        }
    }

    fn lock(&self) -> StdGuard<'_, Vec<Provider>> {
        self.providers.lock().expect("no code that panics runs under this lock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOOK: Duration = Duration::from_millis(20);

    fn health(providers: usize) -> Health {
        let url = |index| SecretUrl::new(format!("http://provider-{index}/v2/SECRET").parse().unwrap());
        Health::new(&(0..providers).map(url).collect::<Vec<_>>())
    }

    async fn asked(health: &Health) -> usize {
        health.enter().await.0
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_that_answers_is_asked_and_the_preferred_again_once_it_answered() {
        let health = health(3);
        assert_eq!(asked(&health).await, 0);
        health.failed(0, "gone", None, TOOK);
        assert_eq!(asked(&health).await, 1);
        health.failed(1, "gone", None, TOOK);
        assert_eq!(asked(&health).await, 2);
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert_eq!(asked(&health).await, 2, "what is read is no trial");
        assert_eq!(health.to_look_at(), [2, 0, 1]);
        health.succeeded(0);
        assert_eq!(asked(&health).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_kept_us_waiting_is_left_alone_for_longer_where_there_is_another() {
        for (providers, left_alone) in [(2, 200), (1, 0)] {
            let health = health(providers);
            health.failed(0, "no answer in time", None, Duration::from_secs(20));
            let mut seconds = 0;
            while !health.to_look_at().contains(&0) {
                tokio::time::sleep(Duration::from_secs(1)).await;
                seconds += 1;
            }
            assert!((left_alone..=left_alone + 1).contains(&seconds), "{seconds} s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn while_none_answers_the_one_whose_pause_ends_first_is_asked_and_one_attempt_is_made_at_a_time() {
        let health = health(2);
        let began = Instant::now();
        health.failed(0, "slow down", Some(Duration::from_secs(7)), TOOK);
        health.failed(1, "slow down", Some(Duration::from_secs(4)), TOOK);
        let (provider, turn) = health.enter().await;
        assert_eq!((provider, began.elapsed()), (1, Duration::from_secs(4)), "its own hint");
        assert!(
            tokio::time::timeout(Duration::from_secs(60), health.enter()).await.is_err(),
            "one at a time"
        );
        drop(turn);
        health.failed(1, "slow down", Some(Duration::from_secs(90)), TOOK);
        assert_eq!(asked(&health).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_rests_or_lags_is_asked_only_where_there_is_no_other() {
        let health = health(2);
        health.rest(0, Duration::from_secs(60));
        assert_eq!(asked(&health).await, 1);
        health.rest(1, Duration::from_secs(30));
        assert_eq!(asked(&health).await, 1, "its rest ends first");
        tokio::time::sleep(Duration::from_secs(61)).await;
        assert_eq!(asked(&health).await, 0);

        health.heads(&[(0, 100), (1, 106)]);
        assert_eq!(asked(&health).await, 0, "once is a moment");
        health.heads(&[(0, 101), (1, 108)]);
        assert_eq!(asked(&health).await, 1);
        health.failed(1, "gone", None, TOOK);
        assert_eq!(asked(&health).await, 0, "better late than never");
        health.succeeded(1);
        health.heads(&[(0, 110), (1, 110)]);
        assert_eq!(asked(&health).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn one_on_another_chain_is_never_asked_again() {
        let health = health(2);
        assert_eq!(health.is_wrong(0), (true, false));
        assert_eq!(asked(&health).await, 1);
        health.failed(1, "gone", None, TOOK);
        assert_eq!(asked(&health).await, 1, "whatever happens");
        assert_eq!((health.to_look_at(), health.others(1)), (vec![1], vec![]));
        assert_eq!(health.is_wrong(1), (true, true));
    }
}
