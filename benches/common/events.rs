//! Logs of the default events, and chains of them.

use alloy::primitives::{Address, B256, U256, hex, keccak256};
use relayer::event::{BlockRef, Event, Log, Recognised, Role, Signatures};

pub const FACTORY: Address = Address::repeat_byte(0xFA);

pub const DEPLOYED: &str = "EscrowDeployed(address,address,address,address,uint256,uint256,uint8)";
pub const APPROVED: &str = "Approved(address)";
pub const RELEASED: &str = "EscrowReleased(address,uint256,uint256)";
pub const REFUNDED: &str = "EscrowRefunded(address,uint256,uint256)";

/// A log to be.
#[derive(Clone, Debug)]
pub struct Emitted {
    pub address: Address,
    pub topics: Vec<B256>,
    pub data: Vec<u8>,
}

impl Emitted {
    /// As a node answers it.
    pub fn json(&self, number: usize, index: usize) -> String {
        let topics: Vec<String> = self.topics.iter().map(|topic| format!("\"{topic}\"")).collect();
        format!(
            "{{\"address\":\"{:#x}\",\"topics\":[{}],\"data\":\"0x{}\",\"blockNumber\":\"{number:#x}\",\
             \"blockHash\":\"{}\",\"blockTimestamp\":\"{:#x}\",\"transactionHash\":\"{}\",\
             \"transactionIndex\":\"{index:#x}\",\"logIndex\":\"{index:#x}\",\"removed\":false}}",
            self.address,
            topics.join(","),
            hex::encode(&self.data),
            block_hash(number),
            block_time(number),
            transaction_hash(number, index),
        )
    }

    /// As the relayer has it once that is read.
    pub fn log(&self, number: usize, index: usize) -> Log {
        Log {
            address: self.address,
            topics: self.topics.clone(),
            data: self.data.clone().into(),
            block: block(number),
            transaction_hash: transaction_hash(number, index),
            transaction_index: index as u64,
            log_index: index as u64,
            block_timestamp: Some(block_time(number)),
        }
    }

    /// Decoded and encoded.
    pub fn event(&self, signatures: &Signatures, number: usize, index: usize) -> Event {
        let log = self.log(number, index);
        let role = if self.address == FACTORY { Role::Announcement } else { Role::Lifecycle };
        match signatures.recognise(role, &log) {
            Recognised::Known(decoded) => decoded.event(1, &log, block_time(number)),
            other => panic!("{other:?}"),
        }
    }
}

/// Blocks are the same in every chain here.
pub fn block_hash(number: usize) -> B256 {
    keccak256(number.to_be_bytes())
}

pub fn block(number: usize) -> BlockRef {
    BlockRef { number: number as u64, hash: block_hash(number) }
}

pub fn block_time(number: usize) -> u64 {
    1_700_000_000 + 12 * number as u64
}

fn transaction_hash(number: usize, index: usize) -> B256 {
    keccak256([number.to_be_bytes(), index.to_be_bytes()].concat())
}

pub fn topic(signature: &str) -> B256 {
    keccak256(signature)
}

/// As spread as the addresses of real contracts are.
pub fn escrow(number: usize) -> Address {
    Address::from_slice(&keccak256(number.to_be_bytes())[12..])
}

fn party(number: usize) -> B256 {
    escrow(number.wrapping_add(1 << 40)).into_word()
}

fn words(values: &[U256]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_be_bytes::<32>()).collect()
}

pub fn deployed(number: usize) -> Emitted {
    let arbiter = U256::from_be_bytes(party(number + 2).0);
    Emitted {
        address: FACTORY,
        topics: vec![topic(DEPLOYED), escrow(number).into_word(), party(number), party(number + 1)],
        data: words(&[arbiter, U256::from(10).pow(U256::from(18)), U256::from(604_800), U256::from(2)]),
    }
}

pub fn approved(number: usize) -> Emitted {
    Emitted { address: escrow(number), topics: vec![topic(APPROVED), party(number)], data: vec![] }
}

pub fn released(number: usize) -> Emitted {
    Emitted {
        address: escrow(number),
        topics: vec![topic(RELEASED), party(number + 1)],
        data: words(&[U256::from(10).pow(U256::from(18)), U256::from(1_700_000_000)]),
    }
}

/// `blocks` blocks: in their first half `escrows` escrows are deployed, in the second each of them is approved.
pub fn chain(escrows: usize, blocks: usize) -> Vec<Vec<Emitted>> {
    let half = blocks / 2;
    let mut chain = vec![Vec::new(); blocks];
    for number in 0..escrows {
        chain[number * half / escrows].push(deployed(number));
        chain[half + number * (blocks - half) / escrows].push(approved(number));
    }
    chain
}
