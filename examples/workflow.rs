//! Is it working? A real escrow, from its creation to its end, and what the settlement service makes of it.
//!
//! ```sh
//! export PRIVATE_KEY=0x…
//! cargo run --example workflow -- --rpc https://… --factory 0x… --settlement-url http://127.0.0.1:8000
//! ```
//!
//! It creates an escrow, waits for its row (`approvals_count` 0), approves, waits for 1, releases, and waits for
//! `released`: chain → relayer → Pub/Sub → settlement service → database. Exit 0 if all of that came, 1 if not, 2 for
//! usage. The settlement service is any that answers `GET /escrows/{address}` with `approvals_count` and `status`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use alloy::dyn_abi::{DynSolValue, JsonAbiExt};
use alloy::json_abi::{Event, Function, StateMutability};
use alloy::network::{EthereumWallet, TransactionBuilder};
use alloy::primitives::{Address, B256, Bytes, U256};
use alloy::providers::{DynProvider, Provider, ProviderBuilder};
use alloy::rpc::types::{TransactionReceipt, TransactionRequest};
use alloy::signers::local::PrivateKeySigner;
use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Parser;
use relayer::rpc::verdict::redact;
use reqwest::Url;
use serde_json::Value;

/// Both generations of the announcement: the escrow is their first indexed argument.
const ANNOUNCEMENTS: [&str; 2] = [
    "EscrowDeployed(address,address,address,address,uint256,uint256,uint8)",
    "EscrowDeployed(address,address,address,uint256,uint256,uint8)",
];
const RELEASED: [&str; 3] =
    ["EscrowReleased(address)", "EscrowReleased(address,uint256)", "EscrowReleased(address,uint256,uint256)"];
/// Of a transaction that cannot be tried beforehand.
const GAS: u64 = 300_000;
/// After its release time, an escrow can be refunded only that much later.
const REFUND_DELAY: u64 = 30 * 86_400;
/// Text of a node or a service is shown up to this length.
const MAX_TEXT: usize = 300;

/// Creates an escrow, approves and releases it, and waits for each step to arrive at the settlement service.
///
/// PRIVATE_KEY is the payer's key (0x and 64 hex digits); it pays for the transactions. PRIVATE_KEY_2 is the
/// payee's, for --two-approvers.
#[derive(Parser)]
struct Options {
    /// The node, http or https.
    #[arg(long)]
    rpc: Url,
    /// The factory that the relayer watches.
    #[arg(long)]
    factory: Address,
    /// Where the settlement service answers GET /escrows/{address}.
    #[arg(long)]
    settlement_url: Url,
    /// The escrow needs two approvals: the payer's and the payee's.
    #[arg(long, conflicts_with = "refund")]
    two_approvers: bool,
    /// Refunds the escrow instead of releasing it. That takes 30 days, which only development chains can skip.
    #[arg(long)]
    refund: bool,
    /// Who gets the money. Default: the owner of PRIVATE_KEY_2 with --two-approvers, else the payer.
    #[arg(long, conflicts_with = "two_approvers")]
    payee: Option<Address>,
    /// Wei to put into the escrow.
    #[arg(long, default_value = "1000000000000")]
    amount: U256,
    /// Seconds before a release is possible. If the last approval comes later, it releases at once.
    #[arg(long, default_value_t = 60)]
    release_delay: u64,
    /// The factory's function. Its arguments are filled by their names: payer, payee, arbiter, amount, releaseDelay,
    /// approvalsRequired.
    #[arg(
        long,
        value_parser = function,
        default_value = "createEscrow(address payee, uint256 releaseDelay, uint8 approvalsRequired, address arbiter) payable"
    )]
    create: Function,
    /// How long each step may take to arrive, in seconds.
    #[arg(long, default_value_t = 180)]
    timeout: u64,
    /// Milliseconds between two looks at the settlement service.
    #[arg(long, default_value_t = 500)]
    poll: u64,
}

fn function(text: &str) -> Result<Function, String> {
    Function::parse(text)
        .map_err(|_| "write it like \"createEscrow(address payee, uint256 releaseDelay) payable\"".to_owned())
}

/// Something only other arguments or variables can mend.
#[derive(Debug)]
struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

fn usage(text: impl Into<String>) -> anyhow::Error {
    Usage(text.into()).into()
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let began = Instant::now();
    match workflow(&options).await {
        Ok(()) => {
            println!("It works: every step arrived. {}", seconds(began));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

/// A key's owner, and a way to send transactions as him.
struct Account {
    address: Address,
    provider: DynProvider,
}

impl Account {
    fn from_variable(name: &str, rpc: &Url) -> Result<Self> {
        let key = std::env::var(name)
            .map_err(|_| usage(format!("{name} is not set: set it to the private key")))?;
        // Whatever is wrong with it, it is not shown.
        let signer: PrivateKeySigner = key
            .trim()
            .parse()
            .map_err(|_| usage(format!("{name} is not a private key: it should be 0x and 64 hex digits")))?;
        let address = signer.address();
        let wallet = EthereumWallet::from(signer);
        let provider = ProviderBuilder::new().wallet(wallet).connect_http(rpc.clone()).erased();
        Ok(Self { address, provider })
    }

    /// Sends a call that was tried before, or that cannot be tried: then with enough gas for anything of ours.
    async fn send(
        &self,
        step: &str,
        call: TransactionRequest,
        timeout: Duration,
    ) -> Result<TransactionReceipt> {
        let sent = Instant::now();
        let pending = self.provider.send_transaction(call).await.map_err(node).context(step.to_owned())?;
        let hash = *pending.tx_hash();
        let receipt = tokio::time::timeout(timeout, pending.get_receipt()).await;
        let receipt = receipt
            .map_err(|_| anyhow!("{step}: {hash} was not mined within {timeout:?}"))?
            .map_err(|error| anyhow!("{step}: {}", redact(&error.to_string(), MAX_TEXT)))?;
        ensure!(receipt.status(), "{step}: {hash} was reverted");
        let block = receipt.block_number.unwrap_or_default();
        println!("   block {block}, transaction {hash}, mined after {}", seconds(sent));
        Ok(receipt)
    }

    /// Whether the call would go through; the node says why not.
    async fn attempt(&self, step: &str, call: &TransactionRequest) -> Result<()> {
        let tried = self.provider.call(call.clone().from(self.address)).await;
        tried.map(drop).map_err(|error| {
            let to = call.to.and_then(|to| to.to().copied()).unwrap_or_default();
            anyhow!("{step}: {to:#x} would refuse it: {}", redact(&error.to_string(), MAX_TEXT))
        })
    }
}

fn node(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("the node refused: {}", redact(&error.to_string(), MAX_TEXT))
}

fn seconds(since: Instant) -> String {
    format!("{:.1} s", since.elapsed().as_secs_f64())
}

fn call(to: Address, function: &str) -> TransactionRequest {
    let function = Function::parse(function).expect("a signature of ours");
    TransactionRequest::default().with_to(to).with_input(Bytes::from(function.selector()))
}

async fn workflow(options: &Options) -> Result<()> {
    let payer = Account::from_variable("PRIVATE_KEY", &options.rpc)?;
    let second = match options.two_approvers {
        true => Some(Account::from_variable("PRIVATE_KEY_2", &options.rpc)?),
        false => None,
    };
    let payee = options.payee.or(second.as_ref().map(|account| account.address)).unwrap_or(payer.address);
    let approvers: Vec<&Account> = [Some(&payer), second.as_ref()].into_iter().flatten().collect();
    let timeout = Duration::from_secs(options.timeout);

    let chain = payer.provider.get_chain_id().await.map_err(node)?;
    let head = payer.provider.get_block_number().await.map_err(node)?;
    let code = payer.provider.get_code_at(options.factory).await.map_err(node)?;
    ensure!(
        !code.is_empty(),
        usage(format!("--factory {:#x} has no code on chain {chain}", options.factory))
    );
    println!("Chain {chain} at block {head}; factory {:#x}; payer {:#x}", options.factory, payer.address);

    println!("1. Create an escrow");
    let create = creation(options, payer.address, payee, approvers.len() as u64)?;
    payer.attempt("creating", &create).await?;
    let receipt = payer.send("creating", create, timeout).await?;
    let created = Instant::now();
    let escrow = announced(options.factory, &receipt)?;
    println!("   escrow {escrow:#x}");
    let settlement = Settlement::new(options, escrow)?;
    settlement.wait("created", 0, "created").await?;

    if options.refund {
        return refund(options, &payer, escrow, &settlement).await;
    }
    let mut released = false;
    for (number, approver) in approvers.iter().enumerate() {
        let count = number as u64 + 1;
        println!("{}. Approve, as {:#x}", count + 1, approver.address);
        approver.attempt("approving", &call(escrow, "approve()")).await?;
        let receipt = approver.send("approving", call(escrow, "approve()"), timeout).await?;
        released = has_release(escrow, &receipt);
        settlement.wait("approved", count, if released { "released" } else { "created" }).await?;
    }
    if released {
        println!("   The approval released it at once, since its time had come.");
        return Ok(());
    }
    println!("{}. Release", approvers.len() + 2);
    let due = Duration::from_secs(options.release_delay + 1);
    if let Some(left) = due.checked_sub(created.elapsed()) {
        println!(
            "   waiting {:.0} s: it can be released {} s after its creation",
            left.as_secs_f64(),
            options.release_delay
        );
        tokio::time::sleep(left).await;
    }
    // Where blocks come only with transactions, the head is too old for trying it first.
    payer.send("releasing", call(escrow, "release()").with_gas_limit(GAS), timeout).await?;
    settlement.wait("released", approvers.len() as u64, "released").await
}

async fn refund(options: &Options, payer: &Account, escrow: Address, settlement: &Settlement) -> Result<()> {
    println!("2. Refund");
    let later = options.release_delay + REFUND_DELAY + 1;
    let skipped: Result<Value, _> = payer.provider.raw_request("evm_increaseTime".into(), [later]).await;
    skipped.map_err(|_| {
        anyhow!("a refund takes 30 days, and this node does not let time pass (evm_increaseTime)")
    })?;
    let _: Value = payer.provider.raw_request("evm_mine".into(), ()).await.map_err(node)?;
    println!("   the node let {} days pass", later / 86_400);
    payer.attempt("refunding", &call(escrow, "refund()")).await?;
    payer.send("refunding", call(escrow, "refund()"), Duration::from_secs(options.timeout)).await?;
    settlement.wait("refunded", 0, "refunded").await
}

/// The call that creates the escrow, its arguments filled by their names.
fn creation(options: &Options, payer: Address, payee: Address, approvals: u64) -> Result<TransactionRequest> {
    let function = &options.create;
    let value = |name: &str, ty: &str| {
        let bits = ty.strip_prefix("uint").map(|bits| bits.parse().unwrap_or(256));
        let number = |number: U256| bits.map(|bits| DynSolValue::Uint(number, bits));
        let address = |address: Address| (ty == "address").then(|| address.into());
        match name {
            "payer" => address(payer),
            "payee" => address(payee),
            "arbiter" => address(Address::ZERO),
            "amount" => number(options.amount),
            "releaseDelay" => number(U256::from(options.release_delay)),
            "approvalsRequired" => number(U256::from(approvals)),
            _ => None,
        }
    };
    let arguments = function.inputs.iter().map(|input| {
        value(&input.name, &input.ty).ok_or_else(|| {
            usage(format!(
                "--create: nothing is known for the argument `{} {}`: there are payer, payee, arbiter (addresses), amount, \
                 releaseDelay, approvalsRequired (numbers)",
                input.ty, input.name
            ))
        })
    });
    let data = function.abi_encode_input(&arguments.collect::<Result<Vec<_>>>()?);
    let data = data.map_err(|error| usage(format!("--create: {error}")))?;
    let request = TransactionRequest::default().with_to(options.factory).with_input(data);
    Ok(match function.state_mutability {
        StateMutability::Payable => request.with_value(options.amount),
        StateMutability::Pure | StateMutability::View | StateMutability::NonPayable => request,
    })
}

fn topic(signature: &str) -> B256 {
    Event::parse(signature).expect("a signature of ours").selector()
}

/// The escrow that the factory announced in this transaction.
fn announced(factory: Address, receipt: &TransactionReceipt) -> Result<Address> {
    let known = ANNOUNCEMENTS.map(topic);
    let of_factory: Vec<_> = receipt.logs().iter().filter(|log| log.address() == factory).collect();
    let found = of_factory.iter().find_map(|log| match log.topics() {
        [topic, escrow, ..] if known.contains(topic) => Some(Address::from_word(*escrow)),
        _ => None,
    });
    found.ok_or_else(|| {
        let topics: Vec<String> =
            of_factory.iter().filter_map(|log| log.topic0()).map(|topic| topic.to_string()).collect();
        anyhow!(
            "the factory announced no escrow with an event known here; topic0 of what it said: [{}]. A new generation of \
             the contracts? Then the relayer needs its signature in factory.events",
            topics.join(", ")
        )
    })
}

fn has_release(escrow: Address, receipt: &TransactionReceipt) -> bool {
    let known = RELEASED.map(topic);
    let is_it = |topic: &B256| known.contains(topic);
    receipt.logs().iter().any(|log| log.address() == escrow && log.topic0().is_some_and(is_it))
}

/// The service at the other end.
struct Settlement {
    http: reqwest::Client,
    row: Url,
    timeout: Duration,
    poll: Duration,
}

impl Settlement {
    fn new(options: &Options, escrow: Address) -> Result<Self> {
        let mut row = options.settlement_url.clone();
        let not_a_base = || usage("--settlement-url: write it like http://127.0.0.1:8000");
        row.path_segments_mut()
            .map_err(|()| not_a_base())?
            .pop_if_empty()
            .extend(["escrows", &format!("{escrow:#x}")]);
        let http = reqwest::Client::builder().timeout(Duration::from_secs(10)).build()?;
        let (timeout, poll) = (Duration::from_secs(options.timeout), Duration::from_millis(options.poll));
        Ok(Self { http, row, timeout, poll })
    }

    /// The row in words, and whether it is as wanted.
    async fn look(&self, approvals: u64, status: &str) -> (String, bool) {
        let answer = match self.http.get(self.row.clone()).send().await {
            Ok(answer) => answer,
            Err(error) => return (format!("no answer ({})", error.without_url()), false),
        };
        let code = answer.status();
        if code == reqwest::StatusCode::NOT_FOUND {
            return ("no row".to_owned(), false);
        }
        let body = answer.bytes().await.unwrap_or_default();
        let Ok(row) = serde_json::from_slice::<Value>(&body) else {
            return (format!("HTTP {} and no JSON", code.as_u16()), false);
        };
        if !code.is_success() {
            return (format!("HTTP {}: {}", code.as_u16(), redact(&row.to_string(), MAX_TEXT)), false);
        }
        let count = row["approvals_count"].as_u64().unwrap_or(0);
        let found = row["status"].as_str().unwrap_or("none").to_lowercase();
        let is_so = count == approvals && found == status;
        (format!("approvals_count {count}, status {found}"), is_so)
    }

    async fn wait(&self, step: &str, approvals: u64, status: &str) -> Result<()> {
        let began = Instant::now();
        loop {
            let (last, is_so) = self.look(approvals, status).await;
            if is_so {
                println!("   settlement: {last}, after {}", seconds(began));
                return Ok(());
            }
            if began.elapsed() >= self.timeout {
                bail!(
                    "{step}, but it did not arrive: the settlement service should say approvals_count {approvals}, status \
                     {status}; it says: {last}, after {}. Look at the relayer's log (does it read this factory, and is \
                     the block beyond its confirmations?), at the subscription (is it on the relayer's topic?) and at the \
                     service's log",
                    seconds(began)
                );
            }
            tokio::time::sleep(self.poll).await;
        }
    }
}
