//! The page as people see it, in a real browser: on a phone and on a desk, in the light and in the dark.
//!
//! Where there is no Chromium these tests say so and pass; `.ci/browser` brings one. With `PICTURES=FOLDER` they leave there
//! what they looked at; `docs/page.png`, which README.md shows, is one of these:
//!
//!     PICTURES=target .ci/browser cargo test --test page && cp target/page.png docs/

mod common;

use std::collections::BTreeSet;

use common::browser::Browser;
use common::pubsub::Code;
use common::relay::free_port;
use common::{Answer, PubSub, Running, World};
use serde_json::Value;

const WIDTHS: [u32; 3] = [360, 780, 1280];

/// A chain, a Pub/Sub, and a relayer between them with its page.
struct Scene {
    world: World,
    pubsub: PubSub,
    url: String,
}

impl Scene {
    async fn new() -> Scene {
        let (mut world, pubsub) = World::new().await.publishing().await;
        let port = free_port();
        world.setup.set("RELAYER_HTTP__LISTEN", format!("127.0.0.1:{port}"));
        Scene { world, pubsub, url: format!("http://127.0.0.1:{port}") }
    }

    async fn start(&self) -> Running {
        let mut relayer = self.world.setup.start(&["run"]);
        relayer.wait_logged("Pages: ").await;
        relayer
    }

    async fn status(&self) -> Value {
        let text = reqwest::get(format!("{}/status", self.url)).await.expect("it answers").text().await;
        serde_json::from_str(&text.expect("text")).expect("JSON")
    }
}

/// Writes what is to be seen, if somebody wants it.
async fn picture(browser: &Browser, name: &str) {
    let Some(folder) = std::env::var_os("PICTURES") else { return };
    let png = decode(&browser.picture().await);
    std::fs::write(std::path::Path::new(&folder).join(name), png).expect("the folder can be written");
}

/// Base64, as Chromium writes it.
fn decode(text: &str) -> Vec<u8> {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |it: u8| DIGITS.iter().position(|digit| *digit == it).expect("a digit") as u32;
    let (mut bits, mut held, mut bytes) = (0_u32, 0, Vec::new());
    for it in text.bytes().take_while(|it| *it != b'=') {
        bits = bits << 6 | digit(it);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    bytes
}

/// The browser asked nobody but the relayer, and had nothing to complain of.
async fn assert_clean(browser: &Browser, url: &str) {
    assert_eq!(browser.console().await, Vec::<String>::new());
    let asked: BTreeSet<String> = browser.requests().await.into_iter().collect();
    assert!(asked.contains(&format!("{url}/status")), "{asked:?}");
    for asked in &asked {
        // The browser's own pages are no host.
        let own = ["chrome:", "data:"].iter().any(|scheme| asked.starts_with(scheme));
        assert!(own || asked.starts_with(url), "{asked}");
    }
}

#[tokio::test]
async fn on_a_phone_and_on_a_desk_the_page_says_what_the_status_says_and_nothing_scrolls_sideways() {
    let Some(browser) = Browser::start().await else { return };
    let scene = Scene::new().await;
    scene.world.factory.create_many(8).await;
    for _ in 0..4 {
        scene.world.factory.create_by("createApproveRelease").await;
    }
    let relayer = scene.start().await;
    scene.pubsub.wait_for(8 + 4 * 4).await;
    browser.open(&scene.url).await;
    let done = "return document.getElementById('waiting').textContent == '0' \
                && document.getElementById('lag').textContent == '0' \
                && document.querySelectorAll('#recent li').length == 20";
    browser.wait("everything published and read", done).await;

    let status = scene.status().await;
    let (chain, events) = (&status["chain"], &status["events"]);
    assert_eq!(browser.text("escrows").await, status["escrows"]["watched"].to_string());
    assert_eq!(browser.text("phase").await, "following the chain");
    let number = |value: &Value| value.to_string();
    for shown in [number(&chain["head"]), number(&chain["finalized"]), number(&chain["start_block"])] {
        assert!(browser.text("chain").await.contains(&shown), "{shown}");
    }
    assert!(browser.text("lag-more").await.ends_with(&number(&chain["cursor"]["number"])));
    assert!(browser.text("rate-more").await.ends_with(&format!("{} in all", events["ever"])));
    assert!(browser.text("sink").await == status["sink"]["name"].as_str().expect("a name"));
    assert!(browser.text("providers").await.contains(&scene.world.anvil.url()));
    let shown = browser
        .run("return [...document.querySelectorAll('#recent li')].map(it => [it.firstChild.textContent, it.querySelector('code').title])")
        .await;
    let told = events["recent"].as_array().expect("a list").iter();
    let told: Vec<Value> =
        told.map(|it| Value::from(vec![it["name"].clone(), it["escrow"].clone()])).collect();
    assert_eq!(shown, Value::from(told));

    for width in WIDTHS {
        for dark in [false, true] {
            browser.look_at(width, dark).await;
            let wide = browser.run("return document.documentElement.scrollWidth").await;
            assert_eq!(wide, width, "it scrolls sideways");
            let outside = "return [...document.querySelectorAll('body *')].filter(it => it.getBoundingClientRect().right > innerWidth + .5) \
                           .map(it => it.outerHTML.slice(0, 80))";
            assert_eq!(browser.run(outside).await, Value::from(Vec::<Value>::new()), "it is cut off");
            let broken = "return [...document.querySelectorAll('#recent li > *')].filter(it => it.offsetHeight > 30).length";
            assert_eq!(browser.run(broken).await, 0, "an event takes more than its line");
            picture(&browser, &format!("page-{width}-{}.png", if dark { "dark" } else { "light" })).await;
        }
    }
    browser.look_at(1000, false).await;
    picture(&browser, "page.png").await;
    assert_clean(&browser, &scene.url).await;
    relayer.stop().await;
    browser.close().await;
}

#[tokio::test]
async fn a_new_event_appears_without_a_reload_and_a_relayer_that_is_gone_or_back_is_said() {
    let Some(browser) = Browser::start().await else { return };
    let scene = Scene::new().await;
    let relayer = scene.start().await;
    browser.open(&scene.url).await;
    browser.wait("none yet", "return document.getElementById('recent').textContent == 'None yet.'").await;
    browser.run("window.untouched = true").await;

    let escrow = scene.world.factory.create_escrow().await;
    let first = format!(
        "return document.querySelector('#recent code')?.title == '{:#x}' && window.untouched",
        escrow.address
    );
    browser.wait("the event", &first).await;
    escrow.send("approve", &[]).await;
    let second = "return document.querySelector('#recent li').firstChild.textContent == 'Approved'";
    browser.wait("the next event", second).await;
    assert_clean(&browser, &scene.url).await;

    assert_eq!(browser.run("return document.getElementById('gone').hidden").await, true);
    relayer.stop().await;
    browser.wait("that it is gone", "return !document.getElementById('gone').hidden").await;
    assert!(browser.text("gone").await.starts_with("The relayer does not answer (no connection)."));
    assert_eq!(browser.text("phase").await, "no answer");
    picture(&browser, "gone.png").await;
    assert!(browser.text("recent").await.contains("Approved"), "what was known stays");

    let relayer = scene.start().await;
    browser
        .wait("that it is back", "return document.getElementById('gone').hidden && window.untouched")
        .await;
    relayer.stop().await;
    browser.close().await;
}

#[tokio::test]
async fn a_blocked_lane_is_shown_with_its_reason_as_text_whatever_markup_that_holds() {
    let Some(browser) = Browser::start().await else { return };
    let scene = Scene::new().await;
    let escrows = scene.world.factory.create_many(3).await;
    let blocked = format!("{:#x}", escrows[0].address);
    let lane = blocked.clone();
    scene.pubsub.on_publish(move |attempt| match attempt.ordering_key == lane {
        true => Answer::Refuse(
            Code::InvalidArgument,
            "</li><img src=http://elsewhere.example/x.png onerror='document.title=1'><script>alert(1)</script>".into(),
        ),
        false => Answer::Store,
    });
    let relayer = scene.start().await;
    browser.open(&scene.url).await;
    browser.wait("the lane", "return !document.getElementById('blocked-card').hidden").await;
    assert_eq!(browser.run("return document.querySelector('#blocked code').title").await, blocked.as_str());
    assert!(browser.text("blocked").await.contains("<script>alert(1)</script>"));
    assert!(browser.text("trouble").await.contains("the first message of 1 lane;"));
    assert!(browser.text("faults").await.contains("<img src="), "{}", browser.text("faults").await);
    assert_eq!(browser.run("return document.querySelectorAll('img, li script').length").await, 0);
    for width in WIDTHS {
        browser.look_at(width, false).await;
        let wide = browser.run("return document.documentElement.scrollWidth").await;
        assert_eq!(wide, width, "it scrolls sideways");
        picture(&browser, &format!("blocked-{width}.png")).await;
    }
    assert_clean(&browser, &scene.url).await;
    relayer.stop().await;
    browser.close().await;
}
