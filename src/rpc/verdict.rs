//! What a provider's refusal means, and what to do about it.
//!
//! Providers reuse codes (−32005 is a result limit at Infura and a rate limit elsewhere) and put the same trouble into
//! many words, so a refusal is understood **by its words first**, through one table ([`TABLE`]); `error.data` is read
//! next; code and HTTP status are hints that count only when the words say nothing known.
//!
//! Three rules hold for every text, known or not:
//!
//! - a rate limit or quota never shrinks a request: asking for less does not make it come faster;
//! - a returned range or cap is never empty and always strictly smaller than what was asked, so following it makes progress;
//! - [`Verdict::Halve`] and [`Verdict::FewerAddresses`] are only said about a request that can be made smaller that way.

use std::num::NonZeroU64;
use std::time::Duration;

use serde::Deserialize;

use crate::config::{self, RefusalText};

/// What a provider said when it refused one call, or a whole HTTP request.
///
/// For a failed connection or a body that is not JSON-RPC, `message` is the error's text or the body.
#[derive(Debug, Clone, Copy, Default)]
pub struct Refusal<'a> {
    pub message: &'a str,
    pub code: Option<i64>,
    pub http_status: Option<u16>,
    /// The `Retry-After` header.
    pub retry_after: Option<Duration>,
    /// The raw JSON of `error.data`.
    pub data: Option<&'a str>,
}

/// The call that was refused. For a batch refused as a whole: its heaviest call, that is its widest range.
///
/// `addresses` counts the addresses in the filter; zero means a filter without addresses, which asks for all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// `eth_getLogs` from a block to a block, both included.
    Range { from: u64, to: u64, addresses: usize },
    /// `eth_getLogs` of one block, named by its hash.
    BlockHash { addresses: usize },
    /// A header by number, by hash or `latest`.
    Header,
    /// A header by the tag `safe` or `finalized`.
    Tag,
    /// Anything else.
    Other,
}

/// What to do about a refusal. Callers match it exhaustively.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Rate limit, overload or quota: ask the same again, later. Without a hint the caller's own backoff decides. A hint
    /// is never zero and at most [`LONGEST_WAIT`].
    Wait { hint: Option<Duration> },
    /// At most so many blocks, counted inclusively (`to = from + n − 1`). Holds for later requests too: remember it.
    CapRange(NonZeroU64),
    /// The provider names a smaller range that begins where the request began. Holds for this request only.
    UseRange { from: u64, to: u64 },
    /// Ask for half the blocks.
    Halve,
    /// Ask for fewer addresses at once; a filter without addresses should name some.
    FewerAddresses,
    /// Put fewer calls into one HTTP request. When it was one call already: treat as [`Verdict::Fault`].
    SmallerBatch,
    /// The node does not have the block yet. Wait or ask another provider; a smaller request is no help.
    Behind,
    /// This provider does not serve this call, however small: method switched off, or the key is refused. Fail over, say so.
    Unsupported,
    /// This provider no longer has these blocks. Halt it, say so.
    HistoryGone,
    /// The node does not know the tag `safe` or `finalized`, or has no such block yet.
    UnknownTag,
    /// Gateway or connection trouble, or a single small query that is too slow. Back off, fail over.
    Fault,
    /// Never seen before, or nothing is left to make smaller. Log it once in full (through [`redact`]); halve, then split
    /// addresses, then back off.
    Unknown,
}

impl Verdict {
    /// A word for it, the same whatever the details.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Wait { .. } => "wait",
            Self::CapRange(_) => "cap_range",
            Self::UseRange { .. } => "use_range",
            Self::Halve => "halve",
            Self::FewerAddresses => "fewer_addresses",
            Self::SmallerBatch => "smaller_batch",
            Self::Behind => "behind",
            Self::Unsupported => "unsupported",
            Self::HistoryGone => "history_gone",
            Self::UnknownTag => "unknown_tag",
            Self::Fault => "fault",
            Self::Unknown => "unknown",
        }
    }
}

/// No hint makes the relayer wait longer than this: a provider's word must not stop it for a day.
pub const LONGEST_WAIT: Duration = Duration::from_secs(60 * 60);

/// A used-up quota comes back at the end of the day or month: knocking every few seconds is of no use, knocking now and
/// then is (the plan may have been upgraded).
pub const QUOTA_WAIT: Duration = Duration::from_secs(10 * 60);

/// Messages are short. A longer text is a page or a runaway body, and its beginning says what it is.
const READ_AT_MOST_BYTES: usize = 4096;

/// What a provider means, before what was asked is considered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    /// Too many requests, or too busy to answer now.
    Busy,
    /// The paid-for amount is used up.
    Quota,
    /// The bare EIP-1474 text "limit exceeded".
    BareLimit,
    /// Too many blocks. The last number of the matching pattern, where it has one, is how many are allowed.
    TooWide,
    /// Too many logs or bytes in the answer.
    TooMuch,
    /// The query took too long.
    TooSlow,
    TooManyAddresses,
    BatchTooLarge,
    Behind,
    Unsupported,
    HistoryGone,
    UnknownTag,
    Fault,
}

impl From<config::Meaning> for Meaning {
    fn from(told: config::Meaning) -> Self {
        match told {
            config::Meaning::Wait => Self::Busy,
            config::Meaning::Halve => Self::TooMuch,
            config::Meaning::Cap => Self::TooWide,
            config::Meaning::Addresses => Self::TooManyAddresses,
            config::Meaning::Batch => Self::BatchTooLarge,
            config::Meaning::Behind => Self::Behind,
            config::Meaning::Unsupported => Self::Unsupported,
            config::Meaning::Pruned => Self::HistoryGone,
            config::Meaning::Fault => Self::Fault,
        }
    }
}

/// One row of the table: any of these patterns means this.
///
/// A pattern is lower-case text found at the beginning of a word; `#` stands for a number (see [`read_number`]). Blanks
/// around `#` do not matter, nor do the colon, equals sign, bracket or quote before a number. `^…$` is the whole text.
struct Row {
    says: &'static [&'static str],
    means: Meaning,
}

const fn row(means: Meaning, says: &'static [&'static str]) -> Row {
    Row { says, means }
}

/// The one classification table. The first row that matches wins, so the order is part of the rule:
///
/// 1. batch texts, since "too many requests in batch" is not a rate limit;
/// 2. quota and rate texts, so that nothing they mention can shrink a request;
/// 3. everything exact (behind, history, tags, addresses);
/// 4. density before caps: Alchemy's size refusal mentions a cap that was not the trouble;
/// 5. caps with a number before caps without;
/// 6. the general words last.
const TABLE: &[Row] = &[
    // geth "batch too large", jsonrpsee (reth) "The batch request was too large", "The batch response was too large",
    // "Batched requests are not supported by this server"; dRPC "Batch of more than 3 requests are not allowed".
    row(
        Meaning::BatchTooLarge,
        &[
            "batch too large",
            "batch is too large",
            "batch request was too large",
            "batch response",
            "batch size",
            "batch limit",
            "batch of more than",
            "max batch",
            "maximum batch",
            "requests in batch",
            "requests in a batch",
            "batched requests are not",
            "batch requests are not",
            "batch requests not",
        ],
    ),
    // The request itself is too many bytes: geth "content length too large", jsonrpsee "Request is too big", nginx 413.
    row(
        Meaning::BatchTooLarge,
        &[
            "content length too large",
            "request is too big",
            "request body too large",
            "request entity too large",
            "payload too large",
        ],
    ),
    // Infura "daily request count exceeded, request rate limited"; Alchemy "Monthly capacity limit exceeded"; 1RPC
    // "exceeded the quota usage". Before the rates: Infura's text says both.
    row(
        Meaning::Quota,
        &[
            "quota",
            "daily request",
            "daily limit",
            "monthly capacity",
            "monthly limit",
            "capacity limit exceeded",
            "out of credits",
            "insufficient credits",
            "payment required",
        ],
    ),
    // Alchemy "compute units per second"; QuickNode "50/second request limit reached", "credits limited to 6000/sec";
    // Ankr "call rate limit exhausted"; Base "over rate limit"; Infura "project ID request rate exceeded"; Chainstack
    // "exceeded the RPS limit".
    row(
        Meaning::Busy,
        &[
            "rate limit",
            "rate-limit",
            "ratelimit",
            "too many requests",
            "request rate",
            "request limit reached",
            "request limit exceeded",
            "compute units per second",
            "credits limited to",
            "concurrent requests",
            "requests per second",
            "requests per minute",
            "calls per second",
            "rps limit",
            "throttled",
            "throttling",
        ],
    ),
    // BSC answers this to every eth_getLogs on its public nodes; elsewhere it is EIP-1474's text for −32005.
    row(Meaning::BareLimit, &["^limit exceeded$"]),
    // Any gateway: a page instead of JSON. After the rates, since a page may say "429 Too Many Requests".
    row(Meaning::Fault, &["<html", "<!doctype", "<head", "<body", "<?xml"]),
    // No answer, or half of one: reqwest, hyper, rustls, serde_json, nginx, envoy; dRPC "Can't route your request".
    row(
        Meaning::Fault,
        &[
            "connection reset",
            "connection refused",
            "connection closed",
            "connection aborted",
            "connection timed out",
            "connection error",
            "broken pipe",
            "error sending request",
            "error trying to connect",
            "incomplete message",
            "operation timed out",
            "tls",
            "certificate",
            "handshake",
            "dns error",
            "failed to lookup",
            "unexpected eof",
            "unexpected end of",
            "eof while parsing",
            "error decoding response body",
            "socket hang up",
            "econnreset",
            "bad gateway",
            "gateway timeout",
            "gateway time-out",
            "service unavailable",
            "service temporarily unavailable",
            "upstream connect error",
            "can't route your request",
        ],
    ),
    // geth and reth "pruned history unavailable" (4444); erigon "old data not available due to pruning"; gateways that
    // sell old blocks separately: "Archive requests require a personal token".
    row(
        Meaning::HistoryGone,
        &["pruned", "pruning", "archive", "history unavailable", "history not available", "historical data"],
    ),
    // geth "safe block not found", "finalized block not found"; rskj "unsupported block tag"; nodes older than the tags
    // parse them as numbers: "hex string without 0x prefix". (besu and erigon say "Unknown block": see `decide`.)
    row(
        Meaning::UnknownTag,
        &["safe block not found", "finalized block not found", "block tag", "hex string without 0x prefix"],
    ),
    // geth "block range extends beyond current head block", "invalid block range params", "unknown block", "header not
    // found"; nethermind and erigon "One of the blocks specified in filter … cannot be found".
    row(
        Meaning::Behind,
        &[
            "beyond current head",
            "invalid block range params",
            "unknown block",
            "header not found",
            "header for hash not found",
            "block not found",
            "blocks specified in filter",
            "block is out of range",
            "greater than the latest block",
            "greater than latest block",
            "not yet available",
        ],
    ),
    // geth "exceed max addresses or topics per search position"; erigon "query exceeds the maximum of 1000 addresses or
    // topics per search position"; PublicNode "Please, specify less number of addresses", and "Please specify an address
    // in your request" to a filter without any.
    row(
        Meaning::TooManyAddresses,
        &[
            "max addresses",
            "maximum addresses",
            "addresses or topics per",
            "maximum of # addresses",
            "more than # addresses",
            "number of addresses",
            "too many addresses",
            "specify an address",
        ],
    ),
    // Infura and zkSync "query returned more than 10000 results"; reth and Ankr "query exceeds max results 20000"; erigon
    // "query returns too many logs, narrow your filter: N"; Arbitrum "logs matched by query exceeds limit of 10000";
    // Alchemy "Log response size exceeded"; geth and Optimism "response too large"; 1RPC "response size should not greater
    // than …"; jsonrpsee "Response is too big".
    row(
        Meaning::TooMuch,
        &[
            "more than # results",
            "more than # logs",
            "max results",
            "maximum results",
            "too many logs",
            "too many results",
            "logs matched by query exceeds",
            "response size",
            "response too large",
            "response is too large",
            "response too big",
            "response is too big",
            "result too large",
            "result set too large",
        ],
    ),
    // reth, PublicNode, Hedera "exceeds max block range 100000"; Cloudflare and cdk-erigon "max range: 800"; Alchemy "up
    // to a 10 block range"; Infura "range 1000000 exceeds limit of 10000"; Tenderly "range 9009594 is bigger than range
    // limit 2000"; erigon "query block range exceeds server limit, narrow your filter: N"; QuickNode "limited to a 10,000
    // range"; 1RPC "limited to 0 - 50 blocks range"; dRPC "ranges over 10000 blocks"; Moonbeam "block range is too wide
    // (maximum 1024)"; Avalanche "requested too many blocks …, maximum is set to 2048"; Thirdweb "Maximum allowed number
    // of requested blocks is 2000".
    row(
        Meaning::TooWide,
        &[
            "max block range #",
            "maximum block range #",
            "block range limit #",
            "block range limit of #",
            "block range limit is #",
            "max range #",
            "maximum range #",
            "up to a # block",
            "up to # block",
            "range # exceeds limit of #",
            "range limit #",
            "range limit of #",
            "block range exceeds server limit, narrow your filter #",
            "limited to a # range",
            "limited to # range",
            "limited to a # block",
            "limited to # block",
            "limited to 0 - # block",
            "ranges over # block",
            "range over # block",
            "range is too wide (maximum #",
            "range greater than # max",
            "maximum is set to #",
            "number of requested blocks is #",
            "maximum of # block",
            "maximum # block",
            "max # block",
            "limit of # block",
            "limit is # block",
            "at most # block",
            "more than # block",
            "blocks distance #",
        ],
    ),
    // besu "Requested range exceeds maximum RPC range limit"; Ankr "block range is too wide"; Optimism "Block range is too
    // large"; Scroll "block range is bigger than maxBlockRange"; Chainstack "Block range limit exceeded".
    row(
        Meaning::TooWide,
        &[
            "range is too",
            "range too",
            "range exceeds",
            "range limit",
            "range is bigger",
            "range is larger",
            "max block range",
            "maximum block range",
            "exceed block range",
            "exceeds block range",
            "too many blocks",
            "block range should work",
            "reduce the block range",
            "reduce your block range",
        ],
    ),
    // geth "the method eth_getLogs does not exist/is not available"; gateways "method is not whitelisted"; a key that is
    // not accepted: Alchemy "Must be authenticated!", Infura "invalid project id".
    row(
        Meaning::Unsupported,
        &[
            "does not exist/is not available",
            "method not found",
            "method not supported",
            "method is not",
            "method not allowed",
            "method is disabled",
            "unsupported method",
            "not whitelisted",
            "must be authenticated",
            "must authenticate",
            "unauthorized",
            "invalid api key",
            "invalid project id",
        ],
    ),
    // Infura "query timeout exceeded"; dRPC "Request timeout on the free tier"; geth "request timed out", "context
    // deadline exceeded".
    row(Meaning::TooSlow, &["timeout", "timed out", "deadline exceeded", "took too long"]),
    // Base "no backend is currently healthy to serve traffic"; envoy "no healthy upstream"; jsonrpsee "Server is busy, try
    // again later".
    row(
        Meaning::Busy,
        &[
            "no backend is",
            "no backends",
            "no healthy",
            "overloaded",
            "is busy",
            "too busy",
            "temporarily unavailable",
            "try again later",
            "try again in #",
            "retry in #",
        ],
    ),
];

/// Says what to do about a refusal. `told`: what the configuration says of some words; it counts before the table.
pub fn classify(refusal: &Refusal, asked: Asked, told: &[RefusalText]) -> Verdict {
    let words = Words::of(refusal);
    if let Some((meaning, numbers)) = words.look_up_told(told).or_else(|| words.look_up()) {
        return decide(meaning, numbers.last().copied(), refusal, &words, asked);
    }
    match hint(refusal) {
        Some(meaning) => decide(meaning, None, refusal, &words, asked),
        None if is_no_answer(refusal.message) => Verdict::Fault,
        None => Verdict::Unknown,
    }
}

/// Joins what the provider means with what was asked.
fn decide(meaning: Meaning, number: Option<u64>, refusal: &Refusal, words: &Words, asked: Asked) -> Verdict {
    match meaning {
        Meaning::Busy => Verdict::Wait { hint: wait_hint(refusal, words) },
        Meaning::Quota => Verdict::Wait { hint: wait_hint(refusal, words).max(Some(QUOTA_WAIT)) },
        Meaning::BareLimit => {
            let is_rate = hint(refusal) == Some(Meaning::Busy) || refusal.retry_after.is_some();
            if asked.is_logs() && !is_rate {
                Verdict::Unsupported
            } else {
                Verdict::Wait { hint: wait_hint(refusal, words) }
            }
        }
        // The cap comes before the suggestion: Alchemy's refusal has both and they agree, but a cap can be remembered.
        Meaning::TooWide => smaller_cap(number, asked)
            .or_else(|| smaller_range(words, refusal.data, asked))
            .unwrap_or_else(|| make_smaller(asked)),
        Meaning::TooMuch => smaller_range(words, refusal.data, asked).unwrap_or_else(|| make_smaller(asked)),
        Meaning::TooSlow => asked.smaller().unwrap_or(Verdict::Fault),
        Meaning::TooManyAddresses if asked.has_many_addresses() => Verdict::FewerAddresses,
        // One address cannot be too many. It is the topics then, or another provider's meaning.
        Meaning::TooManyAddresses => Verdict::Unknown,
        Meaning::BatchTooLarge => Verdict::SmallerBatch,
        // besu and erigon answer "Unknown block" to a tag they cannot resolve (ethereum/execution-apis#879).
        Meaning::Behind if asked == Asked::Tag => Verdict::UnknownTag,
        Meaning::Behind => Verdict::Behind,
        Meaning::Unsupported => Verdict::Unsupported,
        Meaning::HistoryGone => Verdict::HistoryGone,
        Meaning::UnknownTag => Verdict::UnknownTag,
        Meaning::Fault => Verdict::Fault,
    }
}

/// What code and HTTP status say when the words say nothing known. Codes with several meanings (−32000, −32005, −32600,
/// −32602, and −32007: rate at QuickNode, size at jsonrpsee) say nothing.
fn hint(refusal: &Refusal) -> Option<Meaning> {
    let by_code = refusal.code.and_then(|code| match code {
        // Alchemy; Ankr; QuickNode; jsonrpsee "server is busy".
        429 | -32090 | -32012 | -32009 => Some(Meaning::Busy),
        // EIP-4444 nodes.
        4444 => Some(Meaning::HistoryGone),
        // JSON-RPC 2.0 "method not found".
        -32601 => Some(Meaning::Unsupported),
        // execution-apis "unknown block".
        -39001 => Some(Meaning::Behind),
        // QuickNode; dRPC.
        -32614 | 35 => Some(Meaning::TooWide),
        // dRPC.
        30 => Some(Meaning::TooSlow),
        // geth; jsonrpsee.
        -32003 | -32008 => Some(Meaning::TooMuch),
        // jsonrpsee, batch request and batch response.
        -32010 | -32011 => Some(Meaning::BatchTooLarge),
        _ => None,
    });
    by_code.or_else(|| match refusal.http_status? {
        429 => Some(Meaning::Busy),
        402 => Some(Meaning::Quota),
        401 | 403 => Some(Meaning::Unsupported),
        408 => Some(Meaning::TooSlow),
        413 => Some(Meaning::BatchTooLarge),
        // 520 to 530 are Cloudflare's own. A plain 500 may carry a node's answer, so it says nothing.
        404 | 502..=504 | 520..=530 => Some(Meaning::Fault),
        _ => None,
    })
}

/// An empty body, or JSON that breaks off: nobody answered, so there is nothing to understand.
fn is_no_answer(message: &str) -> bool {
    let body = message.trim();
    let looks_like_json = body.starts_with('{') || body.starts_with("[{");
    body.is_empty() || looks_like_json && serde_json::from_str::<serde::de::IgnoredAny>(body).is_err()
}

impl Asked {
    fn is_logs(self) -> bool {
        match self {
            Asked::Range { .. } | Asked::BlockHash { .. } => true,
            Asked::Header | Asked::Tag | Asked::Other => false,
        }
    }

    /// No address filter asks for every address, hence for many.
    fn has_many_addresses(self) -> bool {
        match self {
            Asked::Range { addresses, .. } | Asked::BlockHash { addresses } => addresses != 1,
            Asked::Header | Asked::Tag | Asked::Other => false,
        }
    }

    /// How this call can be made smaller, if it can.
    fn smaller(self) -> Option<Verdict> {
        match self {
            Asked::Range { from, to, .. } if from < to => Some(Verdict::Halve),
            _ if self.has_many_addresses() => Some(Verdict::FewerAddresses),
            _ => None,
        }
    }
}

/// Shrinks what was refused as too wide or too much. One block and one address cannot shrink: no request to this provider
/// will get that answer, which is for a person to see, so it is [`Verdict::Unknown`]. What is not `eth_getLogs` was too
/// much only together with the rest of its batch.
fn make_smaller(asked: Asked) -> Verdict {
    asked.smaller().unwrap_or(if asked.is_logs() { Verdict::Unknown } else { Verdict::SmallerBatch })
}

/// The cap the provider named, if it is smaller than what was asked. One that is not must not be followed: the same
/// request would be refused for ever.
fn smaller_cap(number: Option<u64>, asked: Asked) -> Option<Verdict> {
    let Asked::Range { from, to, .. } = asked else {
        return None;
    };
    let cap = NonZeroU64::new(number?)?;
    // `cap - 1 < to - from` is `cap < blocks` without the overflow of a range over all of u64.
    (cap.get() - 1 < to.saturating_sub(from)).then_some(Verdict::CapRange(cap))
}

/// The range the provider suggests, if following it makes progress. Alchemy has suggested inverted ranges and the
/// request itself, reth the request itself (paradigmxyz/reth#23810).
fn smaller_range(words: &Words, data: Option<&str>, asked: Asked) -> Option<Verdict> {
    let Asked::Range { from, to, .. } = asked else {
        return None;
    };
    words
        .suggestions()
        .chain(data.and_then(suggestion_in_data))
        .find(|&(first, last)| first == from && last >= first && last < to)
        .map(|(from, to)| Verdict::UseRange { from, to })
}

/// Infura repeats its suggestion in `error.data`: `{"from":"0x…","limit":10000,"to":"0x…"}`.
fn suggestion_in_data(data: &str) -> Option<(u64, u64)> {
    #[derive(Deserialize)]
    struct Suggestion<'a> {
        from: &'a str,
        to: &'a str,
    }
    let suggestion: Suggestion = serde_json::from_str(data).ok()?;
    Some((read_number(suggestion.from)?.0, read_number(suggestion.to)?.0))
}

/// The longest of what header and text say; zero says nothing.
fn wait_hint(refusal: &Refusal, words: &Words) -> Option<Duration> {
    refusal.retry_after.max(words.wait()).filter(|wait| !wait.is_zero()).map(|wait| wait.min(LONGEST_WAIT))
}

/// Message and data, made ready for looking things up: lower case, single blanks, no URLs, bounded.
struct Words([String; 2]);

impl Words {
    fn of(refusal: &Refusal) -> Words {
        Words([refusal.message, refusal.data.unwrap_or_default()].map(normalize))
    }

    /// The message counts before the data.
    fn look_up(&self) -> Option<(Meaning, Vec<u64>)> {
        self.0.iter().find_map(|text| {
            TABLE.iter().find_map(|row| {
                let numbers = row.says.iter().find_map(|pattern| find(pattern, text))?;
                Some((row.means, numbers))
            })
        })
    }

    fn look_up_told(&self, told: &[RefusalText]) -> Option<(Meaning, Vec<u64>)> {
        self.0.iter().find_map(|text| {
            told.iter().find_map(|it| Some((it.meaning.into(), find_all(&it.says, text).next()?)))
        })
    }

    /// Every pair of numbers written like a range: Alchemy and Infura "[0x1, 0x2]", reth "range 1-2".
    fn suggestions(&self) -> impl Iterator<Item = (u64, u64)> {
        const PAIRS: [&str; 3] = ["[#, #]", "range # - #", "range # to #"];
        self.0
            .iter()
            .flat_map(|text| PAIRS.into_iter().flat_map(|pair| find_all(pair, text)))
            .filter_map(|numbers| Some((*numbers.first()?, *numbers.get(1)?)))
    }

    /// "retry in 10s" (Ankr), "try again in 100ms", `"backoff_seconds":30` (Infura's data).
    fn wait(&self) -> Option<Duration> {
        const BEFORE_A_WAIT: [&str; 8] = [
            "retry in",
            "retry after",
            "retry-after",
            "retry_after",
            "try again in",
            "try again after",
            "backoff_seconds",
            "resets in",
        ];
        self.0
            .iter()
            .flat_map(|text| BEFORE_A_WAIT.into_iter().map(move |words| (text, words)))
            .filter_map(|(text, words)| read_duration(text.split_once(words)?.1))
            .max()
    }
}

/// URLs are left out because their paths contain words ("…/errors/rate-limits") that nobody said.
fn normalize(text: &str) -> String {
    let bounded = &text[..text.floor_char_boundary(READ_AT_MOST_BYTES)];
    let mut kept = String::with_capacity(bounded.len());
    let mut rest = bounded;
    while let Some((before, after)) = rest.split_once("://") {
        kept.push_str(before.trim_end_matches(|c: char| c.is_ascii_alphanumeric()));
        rest = &after[after.find(ends_url).unwrap_or(after.len())..];
    }
    kept.push_str(rest);
    kept.make_ascii_lowercase();
    let words: Vec<&str> = kept.split_whitespace().collect();
    words.join(" ")
}

/// Finds a pattern of the table in a normalized text. Returns the numbers that stood for its `#`s.
fn find(pattern: &str, text: &str) -> Option<Vec<u64>> {
    match pattern.strip_prefix('^').and_then(|rest| rest.strip_suffix('$')) {
        Some(whole) => (text.trim_end_matches('.') == whole).then(Vec::new),
        None => find_all(pattern, text).next(),
    }
}

fn find_all<'a>(pattern: &'a str, text: &'a str) -> impl Iterator<Item = Vec<u64>> + 'a {
    let mut parts = pattern.split('#').map(str::trim);
    let anchor = parts.next().unwrap_or_default();
    text.match_indices(anchor)
        .filter(|&(at, _)| starts_word(text, at))
        .filter_map(move |(at, _)| read_parts(parts.clone(), &text[at + anchor.len()..]))
}

/// Reads a number and a literal, again and again, from the beginning of the text.
fn read_parts<'p>(literals: impl Iterator<Item = &'p str>, mut text: &str) -> Option<Vec<u64>> {
    let mut numbers = Vec::new();
    for literal in literals {
        let (number, rest) = read_number(text)?;
        text = rest.trim_start().strip_prefix(literal)?;
        numbers.push(number);
    }
    Some(numbers)
}

/// "rate limit" must not be found in "separate limit".
fn starts_word(text: &str, at: usize) -> bool {
    let word_begins = text[at..].starts_with(|c: char| c.is_ascii_alphanumeric());
    let word_goes_on = text[..at].ends_with(|c: char| c.is_ascii_alphanumeric());
    !(word_begins && word_goes_on)
}

/// Reads `0x1f4`, `500`, `10,000` or `2k`, after whatever usually stands before a number. Returns it and the rest.
/// A number too large to hold is the largest: it still says "a cap is here", and no guard lets it through.
fn read_number(text: &str) -> Option<(u64, &str)> {
    let text = text.trim_start_matches([' ', ':', '=', '(', '[', '"', '\'']);
    if let Some(hex) = text.strip_prefix("0x") {
        let end = length_while(hex, |c| c.is_ascii_hexdigit());
        let number = u64::from_str_radix(&hex[..end], 16).unwrap_or(u64::MAX);
        return (end > 0).then_some((number, &hex[end..]));
    }
    let mut end = length_while(text, |c| c.is_ascii_digit());
    if end == 0 {
        return None;
    }
    let mut digits = text[..end].to_owned();
    // "10,000" is one number and "6000000,6000509" two: groups after a comma have three digits, the first at most three.
    while digits.len() <= 3 || end > digits.len() {
        let Some(group) = text[end..].strip_prefix(',') else {
            break;
        };
        if length_while(group, |c| c.is_ascii_digit()) != 3 {
            break;
        }
        digits.push_str(&group[..3]);
        end += 4;
    }
    let number: u64 = digits.parse().unwrap_or(u64::MAX);
    let rest = &text[end..];
    match rest.strip_prefix('k') {
        Some(after) if !after.starts_with(|c: char| c.is_ascii_alphanumeric()) => {
            Some((number.saturating_mul(1000), after))
        }
        Some(_) | None => Some((number, rest)),
    }
}

/// Reads "10s", "100ms", "1m30s", "1.5 seconds", "30": seconds where no unit is named.
fn read_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim_start_matches([' ', ':', '=', '"', '~']);
    let mut total: Option<Duration> = None;
    loop {
        let end = length_while(rest, |c| c.is_ascii_digit() || c == '.');
        let Ok(amount) = rest[..end].trim_end_matches('.').parse::<f64>() else {
            return total;
        };
        rest = rest[end..].trim_start();
        let unit = &rest[..length_while(rest, |c| c.is_ascii_alphabetic())];
        rest = &rest[unit.len()..];
        let seconds = match unit {
            "ms" | "msec" | "millis" | "milliseconds" => amount / 1000.0,
            "m" | "min" | "mins" | "minute" | "minutes" => amount * 60.0,
            "h" | "hour" | "hours" => amount * 3600.0,
            "s" | "sec" | "secs" | "second" | "seconds" => amount,
            // A date such as 2026-11-23 is not a number of seconds.
            _ if rest.starts_with(['-', '/']) => return total,
            _ if total.is_none() => return Duration::try_from_secs_f64(amount).ok(),
            _ => return total,
        };
        let part = Duration::try_from_secs_f64(seconds).ok()?;
        total = Some(total.unwrap_or_default().saturating_add(part));
    }
}

fn length_while(text: &str, keep: impl Fn(char) -> bool) -> usize {
    text.find(|c| !keep(c)).unwrap_or(text.len())
}

/// Makes a provider's text fit for a log: RPC URLs carry API keys, and errors repeat URLs.
///
/// Of a URL only scheme and host are kept. Words that look like a key (sixteen or more characters that mix letters with
/// digits, or small letters with capitals) and whatever is called a key, token, secret or password are replaced by `…`.
/// Block hashes, addresses and quantities in hex are kept, being public. Control and invisible characters go, the rest
/// is cut to `limit` characters.
pub fn redact(text: &str, limit: usize) -> String {
    let visible: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).filter(|&c| !is_invisible(c)).collect();
    let mut clean = String::with_capacity(visible.len());
    let mut next = Next::Anything;
    let mut rest = visible.as_str();
    while let Some(first) = rest.chars().next() {
        if ends_url(first) {
            clean.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let (token, after) = rest.split_at(length_while(rest, |c| !ends_url(c)));
        rest = after;
        if next == Next::Secret && !is_assignment(token) && !is_auth_scheme(token) {
            clean.push('…');
            next = Next::Anything;
        } else {
            redact_token(token, &mut clean);
            next = next.after(token);
        }
    }
    cut(clean, limit)
}

/// What the token after this one may be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Anything,
    /// A word such as "apikey" was read; a colon or an equals sign may follow.
    Assignment,
    Secret,
}

impl Next {
    fn after(self, token: &str) -> Next {
        let name = token.trim_end_matches([':', '=']);
        if is_assignment(token) {
            match self {
                Next::Assignment | Next::Secret => Next::Secret,
                Next::Anything => Next::Anything,
            }
        } else if name.eq_ignore_ascii_case("bearer") || self == Next::Secret && is_auth_scheme(name) {
            Next::Secret
        } else if !names_secret(name) {
            Next::Anything
        } else if name.len() < token.len() {
            Next::Secret
        } else {
            Next::Assignment
        }
    }
}

fn is_assignment(token: &str) -> bool {
    token.trim_matches([':', '=']).is_empty()
}

/// The word between "Authorization:" and the secret.
fn is_auth_scheme(token: &str) -> bool {
    token.eq_ignore_ascii_case("bearer") || token.eq_ignore_ascii_case("basic")
}

fn names_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["key", "token", "secret", "password", "authorization"].iter().any(|secret| name.ends_with(secret))
}

/// Redacts one token: text without blanks, quotes or brackets.
fn redact_token(token: &str, clean: &mut String) {
    if let Some((scheme, address)) = token.split_once("://") {
        redact_words(scheme, clean);
        clean.push_str("://");
        return redact_address(address, clean);
    }
    let host = &token[..length_while(token, |c| !starts_path(c))];
    if host.len() < token.len() && is_host(host) || token.contains('@') {
        return redact_address(token, clean);
    }
    for (i, part) in token.split('&').enumerate() {
        if i > 0 {
            clean.push('&');
        }
        match part.split_once(['=', ':']) {
            Some((name, value)) if names_secret(name) && !value.is_empty() => {
                redact_words(name, clean);
                clean.push_str("=…");
            }
            Some(_) | None => redact_words(part, clean),
        }
    }
}

/// Keeps the host and port of `user:password@host:port/path?query#fragment`.
fn redact_address(address: &str, clean: &mut String) {
    let (authority, path) = address.split_at(length_while(address, |c| !starts_path(c)));
    let (user, host) = match authority.rsplit_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, authority),
    };
    let port = host.split_once(':').map_or("", |(_, port)| port);
    let is_port = port.chars().all(|c| c.is_ascii_digit());
    // Either may be part of a password with an unescaped slash or comma; the host cannot be told from it then.
    if path.contains('@') || !is_port {
        return clean.push('…');
    }
    if user.is_some() {
        clean.push_str("…@");
    }
    // Hyphens join words in host names; a key in one is found between them.
    for (i, part) in host.split('-').enumerate() {
        if i > 0 {
            clean.push('-');
        }
        redact_words(part, clean);
    }
    if path.len() > 1 {
        clean.push_str("/…");
    }
}

fn starts_path(c: char) -> bool {
    matches!(c, '/' | '?' | '#')
}

/// `eth.example.com` or `localhost:8545`; not `1.5`, `e.g.` or `safe`.
fn is_host(text: &str) -> bool {
    let (name, port) = text.split_once(':').unwrap_or((text, ""));
    let top = name.rsplit_once('.').map_or("", |(_, top)| top);
    let has_top = top.len() >= 2 && top.chars().all(|c| c.is_ascii_alphabetic());
    let has_port = !port.is_empty() && port.chars().all(|c| c.is_ascii_digit());
    has_top || has_port
}

fn redact_words(text: &str, clean: &mut String) {
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let word = &rest[..length_while(rest, is_key_character)];
        if word.is_empty() {
            clean.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            clean.push_str(if looks_like_key(word) { "…" } else { word });
            rest = &rest[word.len()..];
        }
    }
}

/// The characters of hex, UUIDs and base64url, which is what providers make keys of.
fn is_key_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '-'
}

fn looks_like_key(word: &str) -> bool {
    const SHORTEST_KEY: usize = 16;
    // A block hash or topic, an address, or a quantity of at most 64 bits.
    let is_public_hex = word.strip_prefix("0x").is_some_and(|hex| {
        matches!(hex.len(), 0..=16 | 40 | 64) && hex.chars().all(|c| c.is_ascii_hexdigit())
    });
    let has = |test: fn(&char) -> bool| word.chars().any(|c| test(&c));
    let has_digit = has(char::is_ascii_digit);
    let has_letter = has(char::is_ascii_alphabetic);
    let has_both_cases = has(char::is_ascii_lowercase) && has(char::is_ascii_uppercase);
    let is_method = word.starts_with("eth_") && !has_digit;
    word.len() >= SHORTEST_KEY && !is_public_hex && !is_method && (has_digit && has_letter || has_both_cases)
}

/// Ends a URL in running text or JSON.
fn ends_url(c: char) -> bool {
    c.is_whitespace()
        || matches!(c, '"' | '\'' | '`' | '<' | '>' | '(' | ')' | '[' | ']' | '{' | '}' | ',' | ';' | '\\')
}

/// Zero-width and direction marks, which make a log show other text than it holds.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

fn cut(text: String, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        None => text,
        Some(_) if limit == 0 => String::new(),
        Some(_) => text.chars().take(limit - 1).chain(['…']).collect(),
    }
}

#[cfg(test)]
mod tests;
