//! A real browser without a window: Chromium, driven by ChromeDriver over WebDriver's plain HTTP.
//!
//! Which: the variables `CHROMIUM` and `CHROMEDRIVER`, else those in `PATH`. Where one of the variables is set, there must be a
//! browser; else a test may go without.

use std::env;
use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::relay::PATIENCE;

/// What keeps Chromium to itself: no sandbox (in a container it has none to offer), no calls home.
const ARGUMENTS: [&str; 11] = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--lang=en",
];

/// A browser with one window. Dropped, it ends.
pub struct Browser {
    _driver: Child,
    http: reqwest::Client,
    session: String,
    _profile: TempDir,
}

impl Browser {
    /// `None`, and a word on standard error: there is none here.
    pub async fn start() -> Option<Browser> {
        let found = find("CHROMEDRIVER", &["chromedriver"])
            .zip(find("CHROMIUM", &["chromium", "chromium-browser", "google-chrome"]));
        let Some((driver, chromium)) = found else {
            let required = ["CHROMEDRIVER", "CHROMIUM"].into_iter().find(|name| env::var_os(name).is_some());
            assert!(
                required.is_none(),
                "{} is set, and there is no such program",
                required.unwrap_or_default()
            );
            // Past the test harness, which shows nothing of a test that passes.
            let _ = writeln!(
                std::io::stderr(),
                "no chromium and chromedriver: a test of the page in a browser was NOT run (see .ci/browser)"
            );
            return None;
        };
        Some(Self::with(driver, chromium).await)
    }

    async fn with(driver: PathBuf, chromium: PathBuf) -> Browser {
        let profile = tempfile::tempdir().expect("a folder can be made");
        let mut child = Command::new(&driver)
            .arg("--port=0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("{} cannot be started: {error}", driver.display()));
        let mut said = BufReader::new(child.stdout.take().expect("piped")).lines();
        let port = async {
            while let Some(line) = said.next_line().await.expect("it says something") {
                if let Some((_, port)) = line.rsplit_once("started successfully on port ") {
                    return port.trim_end_matches('.').parse::<u16>().ok();
                }
            }
            None
        };
        let port = tokio::time::timeout(PATIENCE, port).await.expect("it starts").expect("it says its port");
        tokio::spawn(async move { while let Ok(Some(_)) = said.next_line().await {} });

        let http = reqwest::Client::new();
        let mut arguments: Vec<String> = ARGUMENTS.iter().map(|it| (*it).to_owned()).collect();
        arguments.push(format!("--user-data-dir={}", profile.path().display()));
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome",
            "goog:chromeOptions": { "binary": chromium, "args": arguments },
            "goog:loggingPrefs": { "browser": "ALL", "performance": "ALL" },
        } } });
        let driver = format!("http://127.0.0.1:{port}/session");
        let made = command(&http, &driver, &wanted).await;
        let session = format!("{driver}/{}", made["sessionId"].as_str().expect("a session"));
        let browser = Browser { _driver: child, http, session, _profile: profile };
        // What the page that it begins with asks for, and says, is no concern of ours.
        browser.open("about:blank").await;
        browser.requests().await;
        browser.console().await;
        browser
    }

    async fn command(&self, path: &str, body: Value) -> Value {
        command(&self.http, &format!("{}/{path}", self.session), &body).await
    }

    /// A command of Chromium's own protocol.
    async fn devtools(&self, name: &str, parameters: Value) -> Value {
        self.command("goog/cdp/execute", json!({ "cmd": name, "params": parameters })).await
    }

    pub async fn open(&self, url: &str) {
        self.command("url", json!({ "url": url })).await;
    }

    /// What a script returns.
    pub async fn run(&self, script: &str) -> Value {
        self.command("execute/sync", json!({ "script": script, "args": [] })).await
    }

    /// The text of the element with that id, as it is in the document.
    pub async fn text(&self, id: &str) -> String {
        let text = self.run(&format!("return document.getElementById('{id}').textContent")).await;
        text.as_str().unwrap_or_else(|| panic!("no #{id}")).to_owned()
    }

    /// Waits until the script returns something that is true.
    pub async fn wait(&self, wanted: &str, script: &str) {
        let wait = async {
            while self.run(script).await != Value::Bool(true) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, wait).await.is_err() {
            panic!("not {wanted}: {}", self.run("return document.body.innerText").await);
        }
    }

    /// A screen so wide, and light or dark.
    pub async fn look_at(&self, width: u32, dark: bool) {
        let screen = json!({ "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.devtools("Emulation.setDeviceMetricsOverride", screen).await;
        let scheme = if dark { "dark" } else { "light" };
        let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.devtools("Emulation.setEmulatedMedia", features).await;
    }

    /// The whole page as a PNG, in base64.
    pub async fn picture(&self) -> String {
        let shot = self
            .devtools("Page.captureScreenshot", json!({ "format": "png", "captureBeyondViewport": true }))
            .await;
        shot["data"].as_str().expect("a picture").to_owned()
    }

    /// What the console says since the last look, as text.
    pub async fn console(&self) -> Vec<String> {
        let lines = self.command("se/log", json!({ "type": "browser" })).await;
        lines.as_array().expect("a list").iter().map(|line| line["message"].to_string()).collect()
    }

    /// The URLs asked for since the last look.
    pub async fn requests(&self) -> Vec<String> {
        let lines = self.command("se/log", json!({ "type": "performance" })).await;
        let url = |line: &Value| {
            let message: Value = serde_json::from_str(line["message"].as_str()?).ok()?;
            let message = &message["message"];
            (message["method"] == "Network.requestWillBeSent")
                .then(|| message["params"]["request"]["url"].as_str().map(str::to_owned))?
        };
        lines.as_array().expect("a list").iter().filter_map(url).collect()
    }

    /// Ends it, and waits for that.
    pub async fn close(self) {
        let closed = self.http.delete(&self.session).send().await.expect("it answers");
        assert!(closed.status().is_success(), "{}", closed.status());
    }
}

async fn command(http: &reqwest::Client, url: &str, body: &Value) -> Value {
    let sent = http.post(url).header("content-type", "application/json").body(body.to_string()).send();
    let answer = tokio::time::timeout(PATIENCE, sent).await.expect("it answers in time").expect("it answers");
    let status = answer.status();
    let text = answer.text().await.expect("text");
    assert!(status.is_success(), "{url}: {status} {text}");
    let mut answer: Value = serde_json::from_str(&text).expect("JSON");
    answer["value"].take()
}

/// The program that the variable names, else the first of these in `PATH`.
fn find(variable: &str, names: &[&str]) -> Option<PathBuf> {
    if let Some(path) = env::var_os(variable) {
        return Some(PathBuf::from(path)).filter(|path| path.is_file());
    }
    let folders: Vec<PathBuf> = env::split_paths(&env::var_os("PATH")?).collect();
    let files = names.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    files.into_iter().find(|file| file.is_file())
}
