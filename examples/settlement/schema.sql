-- What stands. Every row that a message brought names the event it came from, so that a retraction takes back exactly
-- that, and nothing is counted twice.

CREATE TABLE IF NOT EXISTS escrows (
    address            TEXT PRIMARY KEY,          -- lower-case
    -- From EscrowDeployed; NULL while only later events of the escrow have been seen.
    payer              TEXT,
    payee              TEXT,
    amount             TEXT,                      -- wei, decimal
    release_delay      INTEGER,                   -- seconds
    approvals_required INTEGER,
    arbiter            TEXT,
    chain_id           INTEGER NOT NULL,
    transaction_hash   TEXT,
    block_number       INTEGER,
    -- Follow from the tables below, in the transaction that changes these.
    approvals_count    INTEGER NOT NULL DEFAULT 0,
    status             TEXT NOT NULL DEFAULT 'created',
    created_at         TEXT NOT NULL,
    updated_at         TEXT NOT NULL
) STRICT;

-- Events applied and not retracted. An event_id names one log in one block.
CREATE TABLE IF NOT EXISTS events (
    event_id     TEXT PRIMARY KEY,
    escrow       TEXT NOT NULL,
    name         TEXT NOT NULL,
    block_number INTEGER NOT NULL,
    log_index    INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS events_of_an_escrow ON events (escrow, block_number, log_index);

CREATE TABLE IF NOT EXISTS approvals (
    event_id TEXT PRIMARY KEY REFERENCES events (event_id) ON DELETE CASCADE,
    escrow   TEXT NOT NULL,
    approver TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS approvals_of_an_escrow ON approvals (escrow);

-- Messages applied: what is delivered again is found here, whatever became of its event since. A new epoch of the
-- relayer numbers anew.
CREATE TABLE IF NOT EXISTS messages (
    escrow   TEXT NOT NULL,
    epoch    TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    PRIMARY KEY (escrow, epoch, sequence)
) STRICT, WITHOUT ROWID;

-- Where the sequence jumped: something was published that never arrived here.
CREATE TABLE IF NOT EXISTS gaps (
    escrow   TEXT NOT NULL,
    epoch    TEXT NOT NULL,
    expected INTEGER NOT NULL,
    got      INTEGER NOT NULL,
    PRIMARY KEY (escrow, epoch, expected)
) STRICT, WITHOUT ROWID;

-- Messages that mean nothing here. They are acknowledged: delivering them again would not help.
CREATE TABLE IF NOT EXISTS rejected (
    message_id TEXT PRIMARY KEY,
    reason     TEXT NOT NULL,
    data       BLOB NOT NULL
) STRICT;
