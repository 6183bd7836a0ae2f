//! Our contracts on a chain: deploy, send, mine, reorg, and read the raw logs that everything else is compared with.
//!
//! Plain JSON-RPC by hand, so that what a test holds for true does not come through the code under test. What cannot
//! go wrong in a sound test panics; [`Chain::try_rpc`] is for what may.

use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use alloy::{
    dyn_abi::{DynSolType, DynSolValue, FunctionExt, JsonAbiExt, Specifier},
    json_abi::{Event, JsonAbi, Param},
    primitives::{Address, B256, Bytes, U256},
};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use tokio::sync::Mutex;

/// What `node tests/contracts/compile.mjs` made of the contracts.
#[derive(Deserialize)]
struct Artifact {
    contracts: BTreeMap<String, Compiled>,
}

#[derive(Deserialize)]
struct Compiled {
    abi: JsonAbi,
    bytecode: Bytes,
}

static ARTIFACT: LazyLock<Artifact> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../contracts/artifact.json")).expect("artifact.json is as compiled")
});

/// How long a transaction may take to be mined.
const RECEIPT_TIMEOUT: Duration = Duration::from_secs(30);

/// Gas of a transaction, where a block holds that much: enough for `createMany(100)`, without asking for an estimate.
const TRANSACTION_GAS: u64 = 200_000_000;

/// A node and its unlocked accounts. Cheap to clone.
#[derive(Clone)]
pub struct Chain {
    http: reqwest::Client,
    url: String,
    accounts: Vec<Address>,
    gas: u64,
    /// Held while a transaction is handed to the pool.
    submitting: Arc<Mutex<()>>,
}

/// A contract at an address.
#[derive(Clone)]
pub struct Contract {
    pub chain: Chain,
    pub name: String,
    pub address: Address,
    abi: &'static JsonAbi,
}

/// What a node answers instead of a result.
#[derive(Debug, Clone, Deserialize)]
pub struct RpcError {
    pub code: i64,
    pub message: String,
    #[serde(default)]
    pub data: Value,
}

/// A log exactly as `eth_getLogs` gives it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Log {
    pub address: Address,
    pub topics: Vec<B256>,
    pub data: Bytes,
    #[serde(deserialize_with = "quantity")]
    pub block_number: u64,
    pub block_hash: B256,
    pub transaction_hash: B256,
    #[serde(deserialize_with = "quantity")]
    pub transaction_index: u64,
    #[serde(deserialize_with = "quantity")]
    pub log_index: u64,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Receipt {
    pub transaction_hash: B256,
    pub block_hash: B256,
    #[serde(deserialize_with = "quantity")]
    pub block_number: u64,
    #[serde(deserialize_with = "quantity")]
    pub status: u64,
    #[serde(deserialize_with = "quantity")]
    pub gas_used: u64,
    pub contract_address: Option<Address>,
    pub logs: Vec<Log>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Block {
    #[serde(deserialize_with = "quantity")]
    pub number: u64,
    pub hash: B256,
    pub parent_hash: B256,
    #[serde(deserialize_with = "quantity")]
    pub timestamp: u64,
    #[serde(deserialize_with = "quantity")]
    pub gas_limit: u64,
    pub transactions: Vec<B256>,
}

/// How often a transaction is submitted whose nonce another one has taken.
const NONCE_TRIES: usize = 20;

impl Chain {
    pub async fn connect(url: impl Into<String>) -> Chain {
        let mut chain = Chain {
            http: reqwest::Client::new(),
            url: url.into(),
            accounts: vec![],
            gas: 0,
            submitting: Arc::default(),
        };
        chain.accounts = chain.read("eth_accounts", json!([])).await;
        chain.gas = chain.head().await.gas_limit.min(TRANSACTION_GAS);
        chain
    }

    /// One JSON-RPC call; a refusal by the node is a value, no answer at all a panic.
    pub async fn try_rpc(&self, method: &str, params: Value) -> Result<Value, RpcError> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let request = json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params });
        let answer = async {
            let sent = self.http.post(&self.url).header("content-type", "application/json");
            sent.body(request.to_string()).send().await?.error_for_status()?.bytes().await
        };
        let bytes = answer.await.unwrap_or_else(|error| panic!("{method}: {error:?}"));
        let mut answer: Value = serde_json::from_slice(&bytes).expect("JSON-RPC answers are JSON");
        match answer.get_mut("error") {
            Some(error) => {
                Err(serde_json::from_value(error.take()).expect("an error has a code and a message"))
            }
            None => Ok(answer["result"].take()),
        }
    }

    pub async fn rpc(&self, method: &str, params: Value) -> Value {
        let shown = params.to_string();
        self.try_rpc(method, params)
            .await
            .unwrap_or_else(|error| panic!("{method} {shown}: {} ({})", error.message, error.code))
    }

    async fn read<T: serde::de::DeserializeOwned>(&self, method: &str, params: Value) -> T {
        let answer = self.rpc(method, params).await;
        serde_json::from_value(answer.clone()).unwrap_or_else(|error| panic!("{method}: {error} in {answer}"))
    }

    /// One of anvil's ten accounts.
    pub fn account(&self, index: usize) -> Address {
        self.accounts[index]
    }

    pub async fn chain_id(&self) -> u64 {
        from_quantity(&self.rpc("eth_chainId", json!([])).await)
    }

    // ---- contracts

    /// Deploys one of `tests/contracts`. Where mining is manual, this mines a block.
    pub async fn deploy(&self, contract: &str, args: &[DynSolValue]) -> Contract {
        let compiled = compiled(contract);
        let data = match compiled.abi.constructor() {
            Some(constructor) => {
                let args = fitted(&constructor.inputs, args);
                let args = constructor.abi_encode_input(&args).expect("arguments fit the constructor");
                [&compiled.bytecode[..], &args].concat()
            }
            None => compiled.bytecode.to_vec(),
        };
        let transaction = self.submit(self.account(0), None, data.into()).await;
        let receipt = self.settle(transaction).await;
        self.at(contract, receipt.contract_address.expect("a deployment has an address"))
    }

    /// The contract of that name at a known address.
    pub fn at(&self, contract: &str, address: Address) -> Contract {
        let abi = &compiled(contract).abi;
        Contract { chain: self.clone(), name: contract.to_owned(), address, abi }
    }

    /// Hands a transaction to the pool and does not wait for it.
    pub async fn submit(&self, from: Address, to: Option<Address>, data: Bytes) -> B256 {
        let mut transaction = json!({ "from": from, "data": data, "gas": hex(self.gas) });
        if let Some(to) = to {
            transaction["to"] = json!(to);
        }
        // The node gives the nonce, to two at once the same one: then it refuses one of them, or takes both and forgets one
        // (seen with 1 of 4,000). So one after the other; what blocks mined or replaced meanwhile do to a nonce it refuses.
        let _alone = self.submitting.lock().await;
        let refusals = ["nonce too low", "already imported", "replacement transaction underpriced"];
        let second = |error: &RpcError| refusals.iter().any(|refusal| error.message.contains(refusal));
        for _ in 1..NONCE_TRIES {
            match self.try_rpc("eth_sendTransaction", json!([transaction])).await {
                Err(error) if second(&error) => {}
                Err(error) => panic!("eth_sendTransaction: {} ({})", error.message, error.code),
                Ok(hash) => return serde_json::from_value(hash).expect("a hash"),
            }
        }
        self.read("eth_sendTransaction", json!([transaction])).await
    }

    /// The receipt as soon as there is one: not the instant the transaction was accepted. A reverted transaction panics.
    pub async fn receipt(&self, transaction: B256) -> Receipt {
        let wait = async {
            loop {
                let receipt: Option<Receipt> =
                    self.read("eth_getTransactionReceipt", json!([transaction])).await;
                match receipt {
                    Some(receipt) => return receipt,
                    None => tokio::time::sleep(Duration::from_millis(2)).await,
                }
            }
        };
        let receipt = tokio::time::timeout(RECEIPT_TIMEOUT, wait)
            .await
            .unwrap_or_else(|_| panic!("{transaction} was not mined within {RECEIPT_TIMEOUT:?}"));
        assert_eq!(receipt.status, 1, "{transaction} was reverted");
        receipt
    }

    /// Sees to it that the transaction is mined.
    async fn settle(&self, transaction: B256) -> Receipt {
        if self.rpc("anvil_getAutomine", json!([])).await == json!(false) {
            self.mine(1).await;
        }
        self.receipt(transaction).await
    }

    // ---- blocks

    pub async fn block_number(&self) -> u64 {
        from_quantity(&self.rpc("eth_blockNumber", json!([])).await)
    }

    pub async fn block(&self, number: u64) -> Block {
        self.read("eth_getBlockByNumber", json!([hex(number), false])).await
    }

    pub async fn head(&self) -> Block {
        self.read("eth_getBlockByNumber", json!(["latest", false])).await
    }

    /// Mines `n` blocks; what waits in the pool goes into the first.
    pub async fn mine(&self, n: u64) {
        self.rpc("anvil_mine", json!([hex(n)])).await;
    }

    /// Whether every transaction is mined at once, in a block of its own. If not, [`Chain::mine`] decides.
    pub async fn set_automine(&self, on: bool) {
        self.rpc("evm_setAutomine", json!([on])).await;
    }

    /// Replaces the newest `depth` blocks by as many empty ones with other hashes. Their transactions are gone.
    pub async fn reorg(&self, depth: u64) {
        self.reorg_keeping(depth, &[]).await;
    }

    /// As [`Chain::reorg`], but mines the given transactions again: each in the new block at that offset, where 0 is
    /// the first replaced one. Keep a sender's transactions from the first replaced one on: one whose nonce has not
    /// come yet cannot be mined.
    pub async fn reorg_keeping(&self, depth: u64, keep: &[(B256, u64)]) {
        let mut pairs = vec![];
        for (transaction, offset) in keep {
            let raw = self.rpc("eth_getRawTransactionByHash", json!([transaction])).await;
            assert!(raw.is_string(), "no transaction {transaction}");
            pairs.push(json!([raw, offset]));
        }
        let first = self.block_number().await + 1 - depth;
        let replaced = self.block(first).await.hash;
        self.begin_branch().await;
        self.rpc("anvil_reorg", json!([depth, pairs])).await;

        assert_ne!(self.block(first).await.hash, replaced, "anvil built the same block again");
        for (transaction, offset) in keep {
            let mined = self.block(first + offset).await.transactions.contains(transaction);
            assert!(mined, "anvil could not keep {transaction}: is its sender's previous one kept, too?");
        }
    }

    /// Takes the newest `depth` blocks away without a replacement: the chain is shorter. What is mined then differs.
    pub async fn roll_back(&self, depth: u64) {
        self.begin_branch().await;
        self.rpc("anvil_rollback", json!([depth])).await;
    }

    /// Blocks of the same content and second have the same hash: without this, a reorg of empty blocks, or one that
    /// keeps every transaction in its place, would be none. So each branch has a miner of its own.
    async fn begin_branch(&self) {
        let miner = Address::from_word(self.head().await.hash);
        self.rpc("anvil_setCoinbase", json!([miner])).await;
    }

    // ---- logs: the truth

    /// All logs of these addresses (of anybody, if empty) in these blocks, whatever their topics, in chain order.
    pub async fn logs(&self, addresses: &[Address], blocks: RangeInclusive<u64>) -> Vec<Log> {
        let mut filter = json!({ "fromBlock": hex(*blocks.start()), "toBlock": hex(*blocks.end()) });
        if !addresses.is_empty() {
            filter["address"] = json!(addresses);
        }
        self.read("eth_getLogs", json!([filter])).await
    }

    /// The same, from the first block to the head.
    pub async fn all_logs(&self, addresses: &[Address]) -> Vec<Log> {
        self.logs(addresses, 0..=self.block_number().await).await
    }

    pub async fn logs_of_block(&self, block: B256) -> Vec<Log> {
        self.read("eth_getLogs", json!([{ "blockHash": block }])).await
    }
}

impl Contract {
    /// Sends from the first account and waits for the receipt. Where mining is manual, this mines a block.
    pub async fn send(&self, function: &str, args: &[DynSolValue]) -> Receipt {
        let transaction = self.submit(function, args).await;
        self.chain.settle(transaction).await
    }

    /// Hands the transaction to the pool and does not wait for it.
    pub async fn submit(&self, function: &str, args: &[DynSolValue]) -> B256 {
        self.submit_from(self.chain.account(0), function, args).await
    }

    pub async fn submit_from(&self, from: Address, function: &str, args: &[DynSolValue]) -> B256 {
        self.chain.submit(from, Some(self.address), self.calldata(function, args)).await
    }

    /// What a view function answers.
    pub async fn call(&self, function: &str, args: &[DynSolValue]) -> Vec<DynSolValue> {
        let request = json!({ "to": self.address, "data": self.calldata(function, args) });
        let output: Bytes = self.chain.read("eth_call", json!([request, "latest"])).await;
        let function = self.function(function);
        function.abi_decode_output(&output).unwrap_or_else(|error| panic!("{}: {error}", function.name))
    }

    /// What a view function without arguments answers, if that is one number or one truth value.
    pub async fn get(&self, function: &str) -> u64 {
        match self.call(function, &[]).await.as_slice() {
            [DynSolValue::Uint(value, _)] => value.to(),
            [DynSolValue::Bool(value)] => u64::from(*value),
            other => panic!("{}.{function}() answered {other:?}", self.name),
        }
    }

    pub fn calldata(&self, function: &str, args: &[DynSolValue]) -> Bytes {
        let function = self.function(function);
        let args = fitted(&function.inputs, args);
        match function.abi_encode_input(&args) {
            Ok(data) => data.into(),
            Err(error) => panic!("{}.{}: {error}", self.name, function.signature()),
        }
    }

    fn function(&self, name: &str) -> &alloy::json_abi::Function {
        match self.abi.function(name).map(Vec::as_slice) {
            Some([function]) => function,
            Some(_) => panic!("{}.{name} is overloaded", self.name),
            None => panic!("{} has no function {name}", self.name),
        }
    }

    /// For a factory: the escrows it announced in this transaction, each once.
    pub fn escrows_in(&self, receipt: &Receipt) -> Vec<Contract> {
        let kind = if self.name == "OlderFactory" { "OlderEscrow" } else { "Escrow" };
        let mut addresses = vec![];
        for log in &receipt.logs {
            let announced = event_of(log).is_some_and(|event| event.name == "EscrowDeployed");
            if announced && log.address == self.address {
                let escrow = Address::from_word(log.topics[1]);
                if !addresses.contains(&escrow) {
                    addresses.push(escrow);
                }
            }
        }
        addresses.into_iter().map(|address| self.chain.at(kind, address)).collect()
    }

    /// For an `EscrowFactory`: creates one escrow through `function`, which takes the arguments of `createEscrow`.
    pub async fn create_by(&self, function: &str) -> (Contract, Receipt) {
        let receipt = self.send(function, &self.escrow_args()).await;
        let mut escrows = self.escrows_in(&receipt);
        assert_eq!(escrows.len(), 1, "{function} announces one escrow");
        (escrows.remove(0), receipt)
    }

    pub async fn create_escrow(&self) -> Contract {
        self.create_by("createEscrow").await.0
    }

    /// `n` escrows in one transaction.
    pub async fn create_many(&self, n: u64) -> Vec<Contract> {
        self.escrows_in(&self.send("createMany", &[n.into()]).await)
    }

    /// Arguments for `createEscrow` and its kin: payer, payee and arbiter are accounts 1 to 3.
    pub fn escrow_args(&self) -> Vec<DynSolValue> {
        let party = |index| self.chain.account(index).into();
        vec![party(1), party(2), party(3), 1_000_000_000_000_000_000u64.into(), 86_400u64.into(), 2u8.into()]
    }

    /// For a `Batch`: all these calls in one transaction, in this order.
    pub async fn run(&self, calls: &[(&Contract, &str, &[DynSolValue])]) -> Receipt {
        let targets: Vec<DynSolValue> = calls.iter().map(|(target, ..)| target.address.into()).collect();
        let data =
            calls.iter().map(|(target, function, args)| target.calldata(function, args).to_vec().into());
        self.send("run", &[DynSolValue::Array(targets), DynSolValue::Array(data.collect())]).await
    }
}

/// Which event of our contracts this log is, by topic0 and number of topics. None for what no ABI of ours declares.
pub fn event_of(log: &Log) -> Option<&'static Event> {
    events().find(|event| {
        let indexed = event.inputs.iter().filter(|input| input.indexed).count();
        log.topics.first() == Some(&event.selector()) && log.topics.len() == indexed + 1
    })
}

/// Every event our contracts declare; one that several declare comes several times.
pub fn events() -> impl Iterator<Item = &'static Event> {
    ARTIFACT.contracts.values().flat_map(|contract| contract.abi.events())
}

fn compiled(contract: &str) -> &'static Compiled {
    ARTIFACT.contracts.get(contract).unwrap_or_else(|| {
        panic!("no contract {contract}, only {:?}", ARTIFACT.contracts.keys().collect::<Vec<_>>())
    })
}

/// Numbers take the width the parameter wants, so that a test may write `2u64.into()` for a `uint8`.
fn fitted(params: &[Param], args: &[DynSolValue]) -> Vec<DynSolValue> {
    let fit = |(index, arg): (usize, &DynSolValue)| match (params.get(index).map(Specifier::resolve), arg) {
        (Some(Ok(DynSolType::Uint(bits))), DynSolValue::Uint(value, _)) => {
            assert!(value.bit_len() <= bits, "{value} does not fit uint{bits}");
            DynSolValue::Uint(*value, bits)
        }
        _ => arg.clone(),
    };
    args.iter().enumerate().map(fit).collect()
}

fn hex(number: u64) -> String {
    format!("{number:#x}")
}

fn from_quantity(value: &Value) -> u64 {
    let quantity: U256 = serde_json::from_value(value.clone()).expect("a hex quantity");
    quantity.to()
}

fn quantity<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    Ok(U256::deserialize(deserializer)?.to())
}
