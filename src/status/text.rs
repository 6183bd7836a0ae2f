//! A status as text for a terminal.

use std::fmt;
use std::time::Duration;

use super::{Phase, Status};
use crate::vitals::Fault;

/// Lines of each list.
const SHOWN: usize = 5;

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Standby => "standing by",
            Self::CatchingUp => "catching up",
            Self::Following => "following the chain",
            Self::Stopping => "stopping",
            Self::Stopped => "not running",
        })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.uptime_seconds {
            Some(uptime) => writeln!(f, "relayer {}, {}, for {}", self.version, self.phase, span(uptime))?,
            None => writeln!(f, "relayer {}, {}: as its store has it", self.version, self.phase)?,
        }
        self.chain_lines(f)?;
        self.event_lines(f)?;
        self.sink_lines(f)?;
        self.provider_lines(f)?;
        self.fault_lines(f)
    }
}

impl Status {
    fn chain_lines(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chain = &self.chain;
        writeln!(f, "chain       {}, factory {:#x}", chain.id, chain.factory)?;
        match (&chain.cursor, chain.start_block) {
            (Some(cursor), _) => writeln!(f, "cursor      block {}  {:#x}", cursor.number, cursor.hash)?,
            (None, Some(start)) => writeln!(f, "cursor      none yet, from block {start} on")?,
            (None, None) => {}
        }
        if let (Some(head), Some(age)) = (chain.head, chain.head_age_seconds) {
            writeln!(f, "head        block {head}, seen {} ago", span(age))?;
        }
        if let Some(lag) = chain.lag_blocks {
            writeln!(f, "lag         {lag} blocks")?;
        }
        if let Some(finalized) = chain.finalized {
            writeln!(f, "finalized   block {finalized}")?;
        }
        if chain.retractions_stopped {
            writeln!(f, "            a fork would withdraw too many messages: reading stands still")?;
        }
        if let Some(escrows) = &self.escrows {
            let also = [
                (escrows.joining, "joining"),
                (escrows.archived, "archived"),
                (escrows.withdrawn, "withdrawn"),
            ];
            write!(f, "escrows     {} watched", escrows.watched)?;
            for (count, state) in also.into_iter().filter(|(count, _)| *count > 0) {
                write!(f, ", {count} {state}")?;
            }
            writeln!(f)?;
        }
        for read in &self.late_reads {
            writeln!(f, "late read   history is read once more, from block {} on", read.next_block)?;
        }
        Ok(())
    }

    fn event_lines(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(events) = &self.events else {
            return Ok(());
        };
        write!(f, "events      {} ever, {} waiting", events.ever, events.waiting)?;
        if let Some(age) = events.oldest_unpublished_seconds {
            write!(f, " (the oldest for {})", span(age))?;
        }
        if events.quarantined > 0 {
            write!(f, ", {} quarantined", events.quarantined)?;
        }
        match events.published_per_second {
            Some(rate) => writeln!(f, ", {rate:.1} a second")?,
            None => writeln!(f)?,
        }
        for event in events.recent.iter().take(SHOWN) {
            let late = if event.late { " (late)" } else { "" };
            let ago = span(self.at.saturating_sub(event.stored_at));
            writeln!(
                f,
                "            {} of {:#x}, block {}{late}, {ago} ago",
                event.name, event.escrow, event.block
            )?;
        }
        Ok(())
    }

    fn sink_lines(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sink        {}", self.sink.name)?;
        match self.sink.outage_since {
            Some(since) => writeln!(f, ": answers nobody for {}", span(self.at.saturating_sub(since)))?,
            None => writeln!(f)?,
        }
        let Some(total) = self.sink.blocked_lanes.filter(|total| *total > 0) else {
            return Ok(());
        };
        writeln!(f, "blocked     {total} lanes")?;
        for lane in self.sink.blocked.iter().take(SHOWN) {
            let ago = span(self.at.saturating_sub(lane.since));
            writeln!(f, "            {} for {ago}: {}", lane.lane, lane.reason)?;
        }
        if self.sink.stopped {
            writeln!(
                f,
                "            they hold as many messages as may be held: nothing is published behind them"
            )?;
        }
        Ok(())
    }

    fn provider_lines(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for provider in &self.providers {
            let answers = match (provider.answers, provider.wrong_chain) {
                (_, true) => "on another chain",
                (true, false) => "answers",
                (false, false) => "does not answer",
            };
            write!(f, "provider {}  {}  {answers}", provider.place, provider.url)?;
            if provider.lag_blocks > 0 {
                write!(f, ", {} blocks behind", provider.lag_blocks)?;
            }
            writeln!(f, "{}", if provider.in_use { ", in use" } else { "" })?;
        }
        match self.rpc_calls {
            Some(calls) => writeln!(f, "calls       {calls}"),
            None => Ok(()),
        }
    }

    fn fault_lines(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Fault { at, text, error } in self.faults.iter().take(SHOWN) {
            let kind = if *error { "error  " } else { "warning" };
            writeln!(f, "{kind}     {} ago: {text}", span(self.at.saturating_sub(*at)))?;
        }
        Ok(())
    }
}

fn span(seconds: u64) -> String {
    humantime::format_duration(Duration::from_secs(seconds)).to_string()
}
