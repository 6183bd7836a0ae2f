//! The relayer's pages, as whoever probes it sees them.

use std::time::Duration;

use serde_json::Value;

use super::{PATIENCE, Setup, free_port};

/// What a page answered.
pub struct Page {
    pub code: u16,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
}

impl Page {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error} in {}", self.text))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().expect("text")
    }
}

/// The pages of one relayer.
#[derive(Clone)]
pub struct Pages {
    pub port: u16,
}

impl Pages {
    /// Of whoever is started with this set-up from now on.
    pub fn of(setup: &mut Setup) -> Pages {
        let port = free_port();
        setup.set("RELAYER_HTTP__LISTEN", format!("127.0.0.1:{port}"));
        Pages { port }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// `None`: nobody answers.
    pub async fn try_get(&self, path: &str) -> Option<Page> {
        let response = reqwest::get(self.url(path)).await.ok()?;
        let (code, headers) = (response.status().as_u16(), response.headers().clone());
        Some(Page { code, headers, text: response.text().await.ok()? })
    }

    pub async fn get(&self, path: &str) -> Page {
        self.try_get(path).await.unwrap_or_else(|| panic!("{path} is not answered"))
    }

    pub async fn status(&self) -> Value {
        self.get("/status").await.json()
    }

    /// Waits until a page, which may not be there yet, is as wanted.
    pub async fn wait(&self, path: &str, wanted: &str, is_so: impl Fn(&Page) -> bool) -> Page {
        let wait = async {
            loop {
                if let Some(page) = self.try_get(path).await.filter(|page| is_so(page)) {
                    return page;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(page) => page,
            Err(_) => panic!("not {wanted}: {:?}", self.try_get(path).await.map(|page| page.text)),
        }
    }

    pub async fn wait_ready(&self) -> Page {
        self.wait("/readyz", "ready", |page| page.code == 200).await
    }

    /// Waits until it is not ready, for that reason among others.
    pub async fn wait_unready(&self, reason: &str) -> Page {
        let named = |page: &Page| page.code == 503 && reasons(page).iter().any(|it| it == reason);
        self.wait("/readyz", &format!("unready: {reason}"), named).await
    }
}

/// Why it is not ready.
pub fn reasons(readiness: &Page) -> Vec<String> {
    let json = readiness.json();
    let reasons = json["reasons"].as_array().expect("a list").iter();
    reasons.map(|it| it["reason"].as_str().expect("a word").to_owned()).collect()
}
