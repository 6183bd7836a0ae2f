//! `relayer status`: what a relayer does right now.

use std::process::ExitCode;

use anyhow::anyhow;
use relayer::config::Config;
use relayer::control::Request;
use relayer::status::Status;

use super::{Missing, Office};
use crate::{Failure, print};

pub(crate) async fn execute(config: &Config, as_json: bool) -> Result<ExitCode, Failure> {
    let office = Office::find(config, Missing::Refuse).await?;
    let status = office.ask(Request::Status).await?.next::<Status>().await?;
    let status = status.ok_or_else(|| anyhow!("the relayer said nothing of its status: try again"))?;
    match as_json {
        true => {
            let text = serde_json::to_string_pretty(&status).map_err(anyhow::Error::from)?;
            print(format_args!("{text}\n"))?;
        }
        false => print(format_args!("{status}"))?,
    }
    Ok(ExitCode::SUCCESS)
}
