use super::*;
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);

/// 5000 blocks and three addresses: wider than most caps.
const WIDE: Asked = Asked::Range { from: 6_000_000, to: 6_004_999, addresses: 3 };

/// A million blocks: wider than any cap in the tests.
const VERY_WIDE: Asked = Asked::Range { from: 6_000_000, to: 6_999_999, addresses: 3 };

const WAIT: Verdict = Verdict::Wait { hint: None };

fn wait(hint: Duration) -> Verdict {
    Verdict::Wait { hint: Some(hint) }
}

fn cap(blocks: u64) -> Verdict {
    Verdict::CapRange(NonZeroU64::new(blocks).unwrap())
}

fn one_block(addresses: usize) -> Asked {
    Asked::Range { from: 7, to: 7, addresses }
}

fn refusal(message: &str, code: i64, http_status: u16) -> Refusal<'_> {
    Refusal { message, code: Some(code), http_status: Some(http_status), ..Refusal::default() }
}

fn words(message: &str) -> Refusal<'_> {
    Refusal { message, ..Refusal::default() }
}

#[track_caller]
/// Without anything told by the configuration.
fn classify_by_table(refusal: &Refusal, asked: Asked) -> Verdict {
    classify(refusal, asked, &[])
}

fn check(rows: &[(&str, i64, u16, Asked, Verdict)]) {
    for (message, code, http_status, asked, verdict) in rows {
        assert_eq!(
            classify_by_table(&refusal(message, *code, *http_status), *asked),
            *verdict,
            "{message} ({code}, HTTP {http_status}), asked {asked:?}"
        );
    }
}

/// Every row of RPC.md's table, in its order, asked for a range.
#[test]
#[rustfmt::skip] // one row, one line
fn every_known_refusal_is_understood() {
    use Verdict::*;
    check(&[
        // geth
        ("exceed max addresses or topics per search position", -32602, 200, WIDE, FewerAddresses),
        ("exceed max addresses", -32602, 200, WIDE, FewerAddresses),
        ("block range extends beyond current head block", -32602, 200, WIDE, Behind),
        ("invalid block range params", -32602, 200, WIDE, Behind),
        ("pruned history unavailable", 4444, 200, WIDE, HistoryGone),
        ("unknown block", -32000, 200, Asked::BlockHash { addresses: 3 }, Behind),
        ("header not found", -32000, 200, Asked::Header, Behind),
        ("batch too large", -32600, 200, WIDE, SmallerBatch),
        ("response too large", -32003, 200, WIDE, Halve),
        ("response too large", -32003, 200, Asked::Header, SmallerBatch),
        // reth
        ("query exceeds max block range 100000", -32602, 200, VERY_WIDE, cap(100_000)),
        (
            "query exceeds max results 20000, retry with the range 6000000-6000509",
            -32602,
            200,
            WIDE,
            UseRange {
                from: 6_000_000,
                to: 6_000_509,
            },
        ),
        // erigon
        ("query returns too many logs, narrow your filter: 1000", -32602, 200, WIDE, Halve),
        ("query block range exceeds server limit, narrow your filter: 1000", -32602, 200, WIDE, cap(1000)),
        (
            "query exceeds the maximum of 1000 addresses or topics per search position",
            -32602,
            200,
            WIDE,
            FewerAddresses,
        ),
        // besu
        ("Requested range exceeds maximum RPC range limit", -32005, 200, WIDE, Halve),
        // Alchemy: free plan cap (cap and suggestion agree; the cap can be kept), size, rate
        (
            "Under the Free tier plan, you can make eth_getLogs requests with up to a 10 block range. Based on your \
             parameters, this block range should work: [0x5b8d80, 0x5b8d89]. Upgrade to PAYG for expanded block range.",
            -32600,
            400,
            WIDE,
            cap(10),
        ),
        (
            "Log response size exceeded. You can make eth_getLogs requests with up to a 2K block range and no limit on \
             the response size, or you can request any block range with a cap of 10K logs in the response. Based on \
             your parameters and the response size limit, this block range should work: [0x5b8d80, 0x5b9000]",
            -32602,
            200,
            WIDE,
            UseRange {
                from: 6_000_000,
                to: 0x5b_9000,
            },
        ),
        ("Log response size exceeded. Please reduce query block range.", -32602, 200, WIDE, Halve),
        (
            "Your app has exceeded its compute units per second capacity. If you have retries enabled, you can safely \
             ignore this message. If not, check out https://docs.alchemy.com/reference/throughput",
            429,
            429,
            WIDE,
            WAIT,
        ),
        // Infura
        (
            "query returned more than 10000 results. Try with this block range [0x5B8D80, 0x5B8E00].",
            -32005,
            200,
            WIDE,
            UseRange {
                from: 6_000_000,
                to: 0x5b_8e00,
            },
        ),
        ("range 1000000 exceeds limit of 10000", -32602, 200, VERY_WIDE, cap(10_000)),
        ("query timeout exceeded", -32005, 200, WIDE, Halve),
        ("project ID request rate exceeded", -32005, 429, WIDE, WAIT),
        ("daily request count exceeded, request rate limited", -32005, 402, WIDE, wait(QUOTA_WAIT)),
        ("", 0, 402, WIDE, wait(QUOTA_WAIT)),
        // QuickNode
        ("eth_getLogs is limited to a 10,000 range", -32614, 413, VERY_WIDE, cap(10_000)),
        (
            "50/second request limit reached - reduce calls per second or upgrade your account at quicknode.com",
            -32007,
            429,
            WIDE,
            WAIT,
        ),
        ("credits limited to 6000/sec", -32012, 429, WIDE, WAIT),
        // Ankr
        ("block range is too wide", -32600, 200, WIDE, Halve),
        ("query exceeds max results 20000", -32602, 200, WIDE, Halve),
        ("Too many requests, reason: call rate limit exhausted, retry in 10s", -32090, 429, WIDE, wait(10 * SECOND)),
        // PublicNode
        ("exceed maximum block range: 50000", -32701, 200, VERY_WIDE, cap(50_000)),
        ("Please, specify less number of addresses.", -32701, 200, WIDE, FewerAddresses),
        // Base public
        ("over rate limit", -32016, 429, WIDE, WAIT),
        ("over rate limit", -32016, 200, WIDE, WAIT),
        ("no backend is currently healthy to serve traffic", -32011, 503, WIDE, WAIT),
        // Arbitrum public
        ("logs matched by query exceeds limit of 10000", -32000, 200, WIDE, Halve),
        // Cloudflare
        (
            "Invalid eth_getLogs request. 'fromBlock'-'toBlock' range too large. Max range: 800",
            -32047,
            200,
            WIDE,
            cap(800),
        ),
        // 1RPC
        ("eth_getLogs is limited to 0 - 50 blocks range", -32602, 200, WIDE, cap(50)),
        ("response size should not greater than 10000000 bytes", -32000, 200, WIDE, Halve),
        // dRPC
        ("ranges over 10000 blocks are not supported on free plan", 35, 400, VERY_WIDE, cap(10_000)),
        ("Request timeout on the free tier, please upgrade your tier to the paid one", 30, 408, WIDE, Halve),
        // Optimism public
        ("Block range is too large", -32020, 200, WIDE, Halve),
        ("backend response too large", -32020, 200, WIDE, Halve),
        // BSC
        ("limit exceeded", -32005, 200, WIDE, Unsupported),
        // any gateway
        ("<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n</html>", 0, 502, WIDE, Fault),
        ("<!DOCTYPE html><html lang=\"en\">", 0, 200, WIDE, Fault),
        ("", 0, 200, WIDE, Fault),
        ("{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":[{\"addr", 0, 200, WIDE, Fault),
        ("EOF while parsing a string at line 1 column 4096", 0, 200, WIDE, Fault),
        ("upstream gone", 0, 502, WIDE, Fault),
        ("upstream gone", 0, 503, WIDE, Fault),
        ("upstream gone", 0, 504, WIDE, Fault),
        ("Connection reset by peer (os error 104)", 0, 0, WIDE, Fault),
        ("invalid peer certificate: UnknownIssuer", 0, 0, WIDE, Fault),
        ("error sending request for url (https://rpc.example/rate-limit)", 0, 0, WIDE, Fault),
    ]);
}

/// Found in issue threads, beyond RPC.md.
#[test]
#[rustfmt::skip] // one row, one line
fn more_refusals_seen_in_the_wild_are_understood() {
    use Verdict::*;
    check(&[
        // cdk-erigon #1706, morph, Moonbeam #3250, Avalanche, Thirdweb, Hedera, Scroll #529, Candle
        ("block range too large, max range: 1000", -32005, 200, WIDE, cap(1000)),
        (
            "block range is larger than max block range, block range = 5000, max block range = 2000",
            -32000,
            200,
            WIDE,
            cap(2000),
        ),
        ("block range is too wide (maximum 1024)", -32603, 200, WIDE, cap(1024)),
        ("requested too many blocks from 6000000 to 6004999, maximum is set to 2048", -32000, 200, WIDE, cap(2048)),
        ("Maximum allowed number of requested blocks is 2000", -32602, 200, WIDE, cap(2000)),
        ("Exceeded maximum block range: 1000", -32000, 200, WIDE, cap(1000)),
        ("block range is bigger than maxBlockRange", -32000, 200, WIDE, Halve),
        ("block range too high", -32600, 200, WIDE, Halve),
        ("Block range limit exceeded.", -32005, 200, WIDE, Halve),
        // jsonrpsee, hence reth and zkSync
        ("Response is too big", -32008, 200, WIDE, Halve),
        ("The batch request was too large", -32010, 200, WIDE, SmallerBatch),
        ("The batch response was too large", -32011, 200, WIDE, SmallerBatch),
        ("Batched requests are not supported by this server", -32005, 200, WIDE, SmallerBatch),
        ("Server is busy, try again later", -32009, 200, WIDE, WAIT),
        // dRPC, Alchemy, Chainstack, PublicNode, nginx, Cloudflare
        ("Batch of more than 3 requests are not allowed on free tier", 31, 500, WIDE, SmallerBatch),
        ("Monthly capacity limit exceeded.", 429, 429, WIDE, wait(QUOTA_WAIT)),
        ("You've exceeded the RPS limit available on the current plan.", -32005, 429, WIDE, WAIT),
        ("Archive requests require a personal token", -32701, 403, WIDE, HistoryGone),
        ("<html><h1>429 Too Many Requests</h1></html>", 0, 429, WIDE, WAIT),
        ("<html><h1>413 Request Entity Too Large</h1></html>", 0, 413, WIDE, SmallerBatch),
        ("Must be authenticated!", -32600, 401, WIDE, Unsupported),
        ("the method eth_getLogs does not exist/is not available", -32601, 200, WIDE, Unsupported),
        ("context deadline exceeded", -32000, 200, WIDE, Halve),
        (
            "Please specify an address in your request or, to remove restrictions, order a dedicated full node here",
            -32701,
            200,
            Asked::Range {
                from: 1,
                to: 9,
                addresses: 0,
            },
            FewerAddresses,
        ),
    ]);
}

#[test]
#[rustfmt::skip] // one row, one line
fn a_tag_the_node_cannot_resolve_is_told_from_a_block_it_lacks() {
    check(&[
        ("finalized block not found", -32000, 200, Asked::Tag, Verdict::UnknownTag),
        ("safe block not found", -32000, 200, Asked::Tag, Verdict::UnknownTag),
        ("unsupported block tag: finalized", -32602, 200, Asked::Tag, Verdict::UnknownTag),
        ("invalid argument 0: hex string without 0x prefix", -32602, 200, Asked::Tag, Verdict::UnknownTag),
        ("Unknown block", -39001, 200, Asked::Tag, Verdict::UnknownTag),
        ("no such thing", -39001, 200, Asked::Tag, Verdict::UnknownTag),
        ("Unknown block", -39001, 200, Asked::Header, Verdict::Behind),
        ("no such thing", -39001, 200, Asked::Header, Verdict::Behind),
    ]);
}

#[test]
#[rustfmt::skip] // one row, one line
fn one_code_means_what_the_words_say() {
    check(&[
        ("query returned more than 10000 results", -32005, 200, WIDE, Verdict::Halve),
        ("daily request count exceeded", -32005, 200, WIDE, wait(QUOTA_WAIT)),
        ("rate limit exceeded", -32005, 200, WIDE, WAIT),
        ("query timeout exceeded", -32005, 200, one_block(1), Verdict::Fault),
        ("block range is too wide", -32600, 200, WIDE, Verdict::Halve),
        ("batch too large", -32600, 200, WIDE, Verdict::SmallerBatch),
        // -32007 is a rate limit at QuickNode
        ("Request is too big", -32007, 200, WIDE, Verdict::SmallerBatch),
        // -32011 is a batch size at jsonrpsee
        ("no backend is currently healthy to serve traffic", -32011, 200, WIDE, WAIT),
    ]);
}

#[test]
#[rustfmt::skip] // one row, one line
fn code_and_status_speak_when_the_words_say_nothing_known() {
    check(&[
        ("nope", -32005, 200, WIDE, Verdict::Unknown),
        ("nope", -32602, 400, WIDE, Verdict::Unknown),
        ("nope", -32000, 500, WIDE, Verdict::Unknown),
        ("nope", 0, 429, WIDE, WAIT),
        ("nope", 429, 200, WIDE, WAIT),
        ("nope", 0, 402, WIDE, wait(QUOTA_WAIT)),
        ("nope", 0, 401, WIDE, Verdict::Unsupported),
        ("nope", 0, 413, WIDE, Verdict::SmallerBatch),
        ("nope", 0, 408, WIDE, Verdict::Halve),
        ("nope", 4444, 200, WIDE, Verdict::HistoryGone),
        ("nope", -32614, 413, WIDE, Verdict::Halve),
        ("nope", -32601, 200, WIDE, Verdict::Unsupported),
        ("nope", 0, 524, WIDE, Verdict::Fault),
    ]);
    let by_status = Refusal {
        http_status: Some(429),
        ..Refusal::default()
    };
    assert_eq!(classify_by_table(&by_status, WIDE), WAIT, "status without a code");
}

#[test]
fn what_the_configuration_says_of_words_counts_first() {
    let told = |meaning, says: &str| RefusalText { meaning, says: says.into() };
    let told = [
        told(config::Meaning::Cap, "no more than # blocks please"),
        told(config::Meaning::Wait, "the moon"),
        told(config::Meaning::Halve, "over rate limit of rows"),
    ];
    let table = [
        ("Sorry: no more than 1,500 blocks please", cap(1500)),
        ("No more than 9000 blocks please", Verdict::Halve),
        ("The  moon is in the wrong phase", WAIT),
        ("over rate limit of rows", Verdict::Halve),
        ("over rate limit", WAIT),
        ("nobody told", Verdict::Unknown),
    ];
    for (text, expected) in table {
        assert_eq!(classify(&words(text), WIDE, &told), expected, "{text}");
    }
}

#[test]
fn an_unheard_of_message_is_unknown() {
    assert_eq!(classify_by_table(&words("the moon is in the wrong phase"), WIDE), Verdict::Unknown);
    assert_eq!(
        classify_by_table(&words("{\"oops\":\"the moon\"}"), WIDE),
        Verdict::Unknown,
        "whole JSON is an answer"
    );
    assert_eq!(
        classify_by_table(&words("separate limits apply"), WIDE),
        Verdict::Unknown,
        "\"rate limit\" is not a part of a word"
    );
    assert_eq!(
        classify_by_table(&words("no. See https://x.example/errors/rate-limits."), WIDE),
        Verdict::Unknown,
        "nobody said what a URL spells"
    );
}

#[test]
fn the_data_is_read_when_the_message_says_nothing() {
    // Tenderly, bobanetwork/boba_legacy#827
    let tenderly = Refusal {
        data: Some(r#"{"error_id":"4ed94073","payload":"range 1000000 is bigger than range limit 2000"}"#),
        ..refusal("invalid params", -32602, 200)
    };
    assert_eq!(classify_by_table(&tenderly, VERY_WIDE), cap(2000));

    let infura = Refusal {
        data: Some(r#"{"from":"0x5B8D80","limit":10000,"to":"0x5B8DFF"}"#),
        ..refusal("query returned more than 10000 results", -32005, 200)
    };
    assert_eq!(classify_by_table(&infura, WIDE), Verdict::UseRange { from: 6_000_000, to: 0x5b_8dff });
}

#[test]
fn a_suggestion_that_makes_no_progress_is_not_followed() {
    let suggest = |from: u64, to: u64| {
        let hex = format!("this block range should work: [{from:#x}, {to:#x}]");
        let dec = format!("query exceeds max results 20000, retry with the range {from}-{to}");
        let verdicts = [hex, dec].map(|text| classify_by_table(&words(&text), WIDE));
        assert_eq!(verdicts[0], verdicts[1], "hex and decimal agree");
        verdicts[0]
    };
    let good = Verdict::UseRange { from: 6_000_000, to: 6_004_998 };
    assert_eq!(suggest(6_000_000, 6_004_998), good);
    assert_eq!(suggest(6_000_000, 6_004_999), Verdict::Halve, "equal");
    assert_eq!(suggest(6_000_000, 5_999_999), Verdict::Halve, "inverted");
    assert_eq!(suggest(6_000_000, 6_005_000), Verdict::Halve, "wider");
    assert_eq!(suggest(5_999_999, 6_000_100), Verdict::Halve, "before");
    assert_eq!(suggest(6_000_001, 6_000_100), Verdict::Halve, "leaves a gap");
    assert_eq!(suggest(7_000_000, 7_000_100), Verdict::Halve, "outside");

    let echo = "range 6000000-6004999 exceeds max results, retry with the range 6000000-6000509";
    assert_eq!(
        classify_by_table(&words(echo), WIDE),
        Verdict::UseRange { from: 6_000_000, to: 6_000_509 },
        "the request's echo is passed over"
    );
}

#[test]
fn a_cap_that_makes_no_progress_is_not_followed() {
    let capped = |blocks: &str| classify_by_table(&words(&format!("Max range: {blocks}")), WIDE);
    assert_eq!(capped("4999"), cap(4999));
    assert_eq!(capped("5000"), Verdict::Halve);
    assert_eq!(capped("5,000"), Verdict::Halve);
    assert_eq!(capped("0"), Verdict::Halve);
    assert_eq!(capped("99999999999999999999999"), Verdict::Halve);

    let whole_chain = Asked::Range { from: 0, to: u64::MAX, addresses: 1 };
    assert_eq!(classify_by_table(&words("max range: 0xffffffffffffffff"), whole_chain), cap(u64::MAX));
    // The cap is no help, the suggestion is.
    let both = "up to a 9000 block range, this block range should work: [0x5b8d80, 0x5b8d81]";
    assert_eq!(classify_by_table(&words(both), WIDE), Verdict::UseRange { from: 6_000_000, to: 6_000_001 });
}

#[test]
fn what_is_too_much_at_one_block_splits_addresses_then_gives_up() {
    for text in ["query returned more than 10000 results", "block range is too wide"] {
        assert_eq!(classify_by_table(&words(text), one_block(2)), Verdict::FewerAddresses);
        assert_eq!(classify_by_table(&words(text), one_block(0)), Verdict::FewerAddresses);
        assert_eq!(classify_by_table(&words(text), one_block(1)), Verdict::Unknown);
    }
    let by_hash = |addresses| classify_by_table(&words("response too large"), Asked::BlockHash { addresses });
    assert_eq!(by_hash(2), Verdict::FewerAddresses);
    assert_eq!(by_hash(1), Verdict::Unknown);

    let slow = |asked| classify_by_table(&words("query timeout exceeded"), asked);
    assert_eq!(slow(one_block(2)), Verdict::FewerAddresses);
    assert_eq!(slow(one_block(1)), Verdict::Fault);
    assert_eq!(slow(Asked::Header), Verdict::Fault);

    let addresses = |asked| classify_by_table(&words("exceed max addresses"), asked);
    assert_eq!(addresses(one_block(2)), Verdict::FewerAddresses);
    assert_eq!(addresses(WIDE), Verdict::FewerAddresses);
    assert_eq!(addresses(one_block(1)), Verdict::Unknown);
}

#[test]
#[rustfmt::skip] // one row, one line
fn the_bare_limit_is_a_missing_method_only_for_logs_at_no_rate() {
    check(&[
        ("Limit exceeded.", -32005, 200, WIDE, Verdict::Unsupported),
        ("limit exceeded", -32005, 429, WIDE, WAIT),
        ("limit exceeded", -32005, 200, Asked::Header, WAIT),
    ]);
}

#[test]
fn the_wait_is_the_longest_one_named_within_reason() {
    let hint = |text: &str, header: Option<u64>| {
        let refusal = Refusal { retry_after: header.map(Duration::from_secs), ..words(text) };
        match classify_by_table(&refusal, WIDE) {
            Verdict::Wait { hint } => hint,
            other => panic!("{text}: {other:?}"),
        }
    };
    let ms = Duration::from_millis;
    assert_eq!(hint("rate limit", None), None);
    assert_eq!(hint("rate limit, retry in 10s", None), Some(ms(10_000)));
    assert_eq!(hint("rate limit: try again in 100ms.", None), Some(ms(100)));
    assert_eq!(hint("busy, try again in 250 ms", None), Some(ms(250)));
    assert_eq!(hint("rate limit, retry after 1.5 seconds", None), Some(ms(1500)));
    assert_eq!(hint("rate limit, retry in 1m30s", None), Some(ms(90_000)));
    assert_eq!(hint("rate limit, Retry-After: 7", None), Some(ms(7000)));
    assert_eq!(hint("rate limit, retry after 2026-11-23T13:00:00Z", None), None);
    assert_eq!(hint("rate limit, retry in 1s", Some(4)), Some(ms(4000)));
    assert_eq!(hint("rate limit, retry in 9s", Some(4)), Some(ms(9000)));
    assert_eq!(hint("rate limit", Some(0)), None);
    assert_eq!(hint("rate limit", Some(u64::MAX)), Some(LONGEST_WAIT));
    assert_eq!(hint("rate limit, retry in 1e9h", None), Some(SECOND));
    assert_eq!(hint("rate limit, retry in 99999999h", None), Some(LONGEST_WAIT));
    assert_eq!(hint("monthly limit, retry in 30s", None), Some(QUOTA_WAIT));

    let infura = Refusal {
        data: Some(r#"{"rate":{"allowed_rps":1,"backoff_seconds":30,"current_rps":1.13}}"#),
        ..words("project ID request rate exceeded")
    };
    assert_eq!(classify_by_table(&infura, WIDE), wait(30 * SECOND));
}

#[test]
fn numbers_are_read_as_providers_write_them() {
    let number = |text| read_number(text).map(|(number, _)| number);
    assert_eq!(number("10,000 range"), Some(10_000));
    assert_eq!(number("1,000,000"), Some(1_000_000));
    assert_eq!(number("6000000,6000509"), Some(6_000_000));
    assert_eq!(number("1,2"), Some(1));
    assert_eq!(number(": (0x1f4]"), Some(500));
    assert_eq!(number("2k block"), Some(2000));
    assert_eq!(number("2kb"), Some(2));
    assert_eq!(number("99999999999999999999"), Some(u64::MAX));
    assert_eq!(number("18446744073709551615k"), Some(u64::MAX));
    assert_eq!(number("0x"), None);
    assert_eq!(number(",123"), None);
    assert_eq!(number("many"), None);
    assert_eq!(number(""), None);
}

#[test]
fn the_table_is_written_the_way_it_is_read() {
    for pattern in TABLE.iter().flat_map(|row| row.says) {
        assert_eq!(*pattern, pattern.to_ascii_lowercase(), "never matches");
        assert!(!pattern.starts_with('#'), "{pattern}: no anchor");
        let sample = pattern.trim_matches(['^', '$']).replace('#', "5");
        assert!(find(pattern, &sample).is_some(), "{pattern}: not found in {sample}");
    }
}

#[test]
fn no_key_reaches_a_log() {
    let rows = [
        (
            "error sending request for url (https://eth-mainnet.g.alchemy.com/v2/abc)",
            "error sending request for url (https://eth-mainnet.g.alchemy.com/…)",
        ),
        ("wss://user:pa:ss@node.example:8546/ws", "wss://…@node.example:8546/…"),
        ("https://user:pa/ss@node.example/ws", "https://…"),
        ("https://user:pa,ss@node.example/ws", "https://…,…@node.example/…"),
        ("at https://node.example?apikey=abc#x, later", "at https://node.example/…, later"),
        ("lookup rpc.ankr.com/eth/abc failed", "lookup rpc.ankr.com/… failed"),
        ("dial localhost:8545/abc", "dial localhost:8545/…"),
        ("invalid project id 0123456789abcdef0123456789abcdef", "invalid project id …"),
        ("key 4ed94073-0317-4648-a167-107fba5f44b3 is unknown", "key … is unknown"),
        ("_gHhOgCqAFaaTfRPeHmpHx-zVcNabcdef", "…"),
        ("apikey=abc&chain=1", "apikey=…&chain=1"),
        ("chain=1&token=abc", "chain=1&token=…"),
        ("api key: abc, plan free", "api key: …, plan free"),
        (r#"{"apiKey":"abc","plan":"free"}"#, r#"{"apiKey":"…","plan":"free"}"#),
        ("Authorization: Bearer abc", "Authorization: Bearer …"),
        ("a\u{1b}[31mb\r\nc\u{202e}d\u{0}", "a [31mb  cd "),
    ];
    for (text, clean) in rows {
        assert_eq!(redact(text, 1000), clean);
    }
}

#[test]
fn what_helps_a_reader_stays() {
    for text in [
        "query returned more than 10000 results. Try with this block range [0x5B8D80, 0x5B8E00].",
        "retry with the range 6000000-6000509",
        "the method eth_getTransactionReceipt does not exist/is not available",
        "unknown block 0xd4e56740f876aef8c010b86a40d5f56745a118d0906a34e69aec8c0db1cb8fa3",
        "address 0x2F9EC37d6CcFFf1caB21733BdaDEdE11c823cCB0 is not a contract",
        "50/second request limit reached - reduce calls per second or upgrade at quicknode.com",
    ] {
        assert_eq!(redact(text, 1000), text);
    }
}

#[test]
fn a_long_text_is_cut_at_a_character() {
    assert_eq!(redact("añoñoñ", 4), "año…");
    assert_eq!(redact("añoñ", 4), "añoñ");
    assert_eq!(redact("añoñ", 0), "");
}

/// Scraps of what providers say, so that random texts reach every row.
fn any_text() -> impl Strategy<Value = String> {
    let patterns: Vec<&str> = TABLE.iter().flat_map(|row| row.says).copied().collect();
    let number = prop_oneof![
        (0u64..40).prop_map(|n| n.to_string()),
        (0u64..40).prop_map(|n| format!("{n:#x}")),
        any::<u64>().prop_map(|n| n.to_string()),
        any::<u64>().prop_map(|n| format!("0x{n:x}")),
        Just("10,000".to_owned()),
        Just("2K".to_owned()),
    ];
    let scrap = prop_oneof![
        (proptest::sample::select(patterns), number.clone())
            .prop_map(|(text, n)| text.trim_matches(['^', '$']).replace('#', &n)),
        (number.clone(), number.clone()).prop_map(|(a, b)| format!("range [{a}, {b}]")),
        (number.clone(), number.clone()).prop_map(|(a, b)| format!("range {a}-{b}")),
        number.prop_map(|n| format!("retry in {n}")),
        any::<String>(),
        "[ -~]{0,12}",
    ];
    proptest::collection::vec(scrap, 0..5).prop_map(|scraps| scraps.join(" "))
}

fn any_asked() -> impl Strategy<Value = Asked> {
    let block = || prop_oneof![0u64..40, any::<u64>(), Just(u64::MAX)];
    prop_oneof![
        4 => (block(), block(), 0usize..4).prop_map(|(a, b, addresses)| Asked::Range {
            from: a.min(b),
            to: a.max(b),
            addresses,
        }),
        1 => (0usize..4).prop_map(|addresses| Asked::BlockHash { addresses }),
        1 => prop_oneof![Just(Asked::Header), Just(Asked::Tag), Just(Asked::Other)],
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn every_verdict_makes_progress(
        message in any_text(),
        data in proptest::option::of(any_text()),
        code in proptest::option::of(prop_oneof![any::<i64>(), -32700i64..-31999, 0i64..5000]),
        http_status in proptest::option::of(100u16..600),
        retry_after in proptest::option::of(any::<u64>().prop_map(Duration::from_secs)),
        asked in any_asked(),
    ) {
        let refusal = Refusal { message: &message, code, http_status, retry_after, data: data.as_deref() };
        let verdict = classify_by_table(&refusal, asked);
        match (verdict, asked) {
            (Verdict::UseRange { from, to }, Asked::Range { from: asked_from, to: asked_to, .. }) => {
                prop_assert!(from == asked_from && from <= to && to < asked_to);
            }
            (Verdict::CapRange(cap), Asked::Range { from, to, .. }) => {
                prop_assert!(u128::from(cap.get()) < u128::from(to) - u128::from(from) + 1);
            }
            (Verdict::Halve, Asked::Range { from, to, .. }) => prop_assert!(from < to),
            (Verdict::UseRange { .. } | Verdict::CapRange(_) | Verdict::Halve, _) => {
                prop_assert!(false, "{:?} for {:?}", verdict, asked);
            }
            (Verdict::FewerAddresses, _) => prop_assert!(asked.has_many_addresses()),
            (Verdict::Wait { hint: Some(hint) }, _) => {
                prop_assert!(!hint.is_zero() && hint <= LONGEST_WAIT);
            }
            _ => {}
        }
    }

    #[test]
    fn a_rate_limit_never_shrinks(before in "[a-z0-9 ]{0,20}", after in any_text(), asked in any_asked()) {
        let text = format!("{before} over rate limit");
        let is_wait = |text: &str| matches!(classify_by_table(&words(text), asked), Verdict::Wait { .. });
        prop_assert!(is_wait(&text));
        // Only a text about the batch itself comes before a rate limit.
        let both = format!("{text}, {after}");
        prop_assert!(is_wait(&both) || classify_by_table(&words(&both), asked) == Verdict::SmallerBatch);
    }

    #[test]
    fn redacted_text_is_short_and_clean(text in any_text(), limit in 0usize..200) {
        let clean = redact(&text, limit);
        prop_assert!(clean.chars().count() <= limit);
        prop_assert!(!clean.contains(char::is_control));
    }

    #[test]
    fn a_key_in_a_url_is_never_kept(
        before in any_text(),
        key in "[A-Za-z0-9_-]{6,64}",
        after in any_text(),
        shape in 0usize..4,
    ) {
        let url = match shape {
            0 => format!("https://node.example/v2/{key}"),
            1 => format!("wss://node.example:443/?apikey={key}"),
            2 => format!("http://user:{key}@node.example"),
            _ => format!("node.example/{key}"),
        };
        prop_assume!(!before.contains(&key) && !after.contains(&key) && !url.replace(&key, "").contains(&key));
        let clean = redact(&format!("{before} {url} {after}"), 10_000);
        prop_assert!(!clean.contains(&key), "{}", clean);
    }
}
