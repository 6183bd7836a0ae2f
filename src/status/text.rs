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
        if let Some(holder) = &self.lease_holder {
            writeln!(f, "lease       {holder}: this one goes on when that ends")?;
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
        if chain.factory_without_code {
            writeln!(f, "            the factory has no code: nothing is read before there is a contract")?;
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

#[cfg(test)]
mod tests {
    use alloy::primitives::{Address, B256};

    use super::super::{Block, Late, Provider, Recent};
    use super::*;
    use crate::status::Events;
    use crate::store::Census;
    use crate::vitals::BlockedLane;

    fn with_everything() -> Status {
        let mut status = Status::blank(5, Address::repeat_byte(0xFA), "Pub/Sub projects/p/topics/t".into());
        status.version = "1.2.3".into();
        status.at = 10_000;
        status.phase = Phase::CatchingUp;
        status.uptime_seconds = Some(3_725);
        let hash = B256::repeat_byte(0xAB);
        let chain = &mut status.chain;
        (chain.head, chain.head_age_seconds, chain.lag_blocks) = (Some(900), Some(3), Some(150));
        (chain.cursor, chain.finalized) = (Some(Block { number: 748, hash }), Some(836));
        chain.retractions_stopped = true;
        status.escrows = Some(Census { watched: 7, joining: 0, archived: 2, withdrawn: 1 });
        status.late_reads = vec![Late { next_block: 12, signatures: 1 }];
        let recent = Recent {
            name: "Approved".into(),
            escrow: Address::repeat_byte(1),
            block: 747,
            sequence: 2,
            late: true,
            stored_at: 9_940,
        };
        status.events = Some(Events {
            ever: 40,
            waiting: 3,
            oldest_unpublished_seconds: Some(130),
            oldest_unblocked_seconds: None,
            published_per_second: Some(0.25),
            quarantined: 1,
            recent: vec![recent],
        });
        let sink = &mut status.sink;
        (sink.outage_since, sink.blocked_lanes, sink.stopped) = (Some(9_995), Some(30), true);
        sink.blocked =
            vec![BlockedLane { lane: "escrow-7".into(), reason: "too large".into(), since: 9_000 }];
        status.providers = vec![Provider {
            place: 0,
            url: "https://rpc.example/…".into(),
            answers: false,
            silent_seconds: Some(9),
            wrong_chain: false,
            lag_blocks: 6,
            in_use: true,
        }];
        status.rpc_calls = Some(1_234);
        status.faults =
            vec![Fault { at: 9_991, error: false, text: "The RPC provider does not answer".into() }];
        status
    }

    #[test]
    fn everything_that_is_known_has_a_line_that_a_person_can_read() {
        let expected = "\
relayer 1.2.3, catching up, for 1h 2m 5s
chain       5, factory 0xfafafafafafafafafafafafafafafafafafafafa
cursor      block 748  0xabababababababababababababababababababababababababababababababab
head        block 900, seen 3s ago
lag         150 blocks
finalized   block 836
            a fork would withdraw too many messages: reading stands still
escrows     7 watched, 2 archived, 1 withdrawn
late read   history is read once more, from block 12 on
events      40 ever, 3 waiting (the oldest for 2m 10s), 1 quarantined, 0.2 a second
            Approved of 0x0101010101010101010101010101010101010101, block 747 (late), 1m ago
sink        Pub/Sub projects/p/topics/t: answers nobody for 5s
blocked     30 lanes
            escrow-7 for 16m 40s: too large
            they hold as many messages as may be held: nothing is published behind them
provider 0  https://rpc.example/…  does not answer, 6 blocks behind, in use
calls       1234
warning     9s ago: The RPC provider does not answer
";
        assert_eq!(with_everything().to_string(), expected);
    }

    #[test]
    fn what_is_not_known_has_no_line() {
        let status = Status::blank(5, Address::ZERO, "stdout".into());
        let lines: Vec<String> = status.to_string().lines().map(str::to_owned).collect();
        let factory = format!("chain       5, factory {:#x}", Address::ZERO);
        let version = env!("CARGO_PKG_VERSION");
        let first = format!("relayer {version}, starting: as its store has it");
        assert_eq!(lines, [first, factory, "sink        stdout".to_owned()]);
    }
}
