// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity 0.8.37;

// Escrows and the two generations of factory that announce them, for tests and the demo. No money moves: what
// counts here are the events, the address each is emitted from, and the order in which they stand in a transaction.

/// One escrow of the deployed generation. It can also speak as the older generations did, and emit logs no
/// correct contract would, because what a registered escrow emits is what the relayer has to cope with.
contract Escrow {
    event EscrowCreated(
        address indexed payer,
        address indexed payee,
        address indexed arbiter,
        uint256 amount,
        uint256 releaseTime,
        uint8 approvalsRequired
    );
    event Approved(address indexed approver);
    event EscrowReleased(address indexed payee, uint256 amount, uint256 timestamp);
    event EscrowRefunded(address indexed payer, uint256 amount, uint256 timestamp);

    // As the older ABI had them.
    event EscrowReleased(address indexed payee, uint256 amount);
    event EscrowRefunded(address indexed payer, uint256 amount);

    // As the plan document had them.
    event EscrowReleased(address indexed payee);
    event EscrowRefunded(address indexed payer);

    // Of a generation nobody has told the relayer about.
    event EscrowReleased(address indexed payee, uint256 amount, uint256 timestamp, bytes32 reason);

    address public immutable payer;
    address public immutable payee;
    address public immutable arbiter;
    uint256 public immutable amount;
    uint256 public immutable releaseDelay;
    uint8 public immutable approvalsRequired;

    uint256 public approvalsCount;
    bool public released;
    bool public refunded;

    /// `firstApprover` other than zero approves already here: that log precedes the factory's announcement.
    constructor(
        address payer_,
        address payee_,
        address arbiter_,
        uint256 amount_,
        uint256 releaseDelay_,
        uint8 approvalsRequired_,
        address firstApprover
    ) {
        payer = payer_;
        payee = payee_;
        arbiter = arbiter_;
        amount = amount_;
        releaseDelay = releaseDelay_;
        approvalsRequired = approvalsRequired_;
        emit EscrowCreated(payer_, payee_, arbiter_, amount_, block.timestamp + releaseDelay_, approvalsRequired_);
        if (firstApprover != address(0)) approveAs(firstApprover);
    }

    function approve() external {
        approveAs(msg.sender);
    }

    function approveAs(address approver) public {
        approvalsCount += 1;
        emit Approved(approver);
    }

    function release() external {
        released = true;
        emit EscrowReleased(payee, amount, block.timestamp);
    }

    function refund() external {
        refunded = true;
        emit EscrowRefunded(payer, amount, block.timestamp);
    }

    function emitReleasedOlder() public {
        emit EscrowReleased(payee, amount);
    }

    function emitReleasedPlan() public {
        emit EscrowReleased(payee);
    }

    function emitRefundedOlder() public {
        emit EscrowRefunded(payer, amount);
    }

    function emitRefundedPlan() public {
        emit EscrowRefunded(payer);
    }

    /// Every signature an escrow was ever seen to emit, all generations, in one transaction.
    function emitAll() external {
        emit Approved(payer);
        emitReleasedPlan();
        emitReleasedOlder();
        emit EscrowReleased(payee, amount, block.timestamp);
        emitRefundedPlan();
        emitRefundedOlder();
        emit EscrowRefunded(payer, amount, block.timestamp);
    }

    /// A known name whose topic0 is unknown: the fourth generation.
    function emitUnknown() external {
        emit EscrowReleased(payee, amount, block.timestamp, bytes32(0));
    }

    /// The topics of a release, but 5 bytes of data where 64 belong.
    function emitTruncatedRelease() external {
        bytes32 topic = keccak256("EscrowReleased(address,uint256,uint256)");
        address indexedPayee = payee;
        assembly ("memory-safe") {
            log2(0, 5, topic, indexedPayee)
        }
    }

    /// `Approved` without its indexed approver: one topic where two belong.
    function emitApprovedWithoutApprover() external {
        bytes32 topic = keccak256("Approved(address)");
        assembly ("memory-safe") {
            log1(0, 0, topic)
        }
    }

    /// Any log at all, at most four topics.
    function emitRaw(bytes32[] calldata topics, bytes memory data) external {
        assembly {
            let start := add(data, 32)
            let size := mload(data)
            let topic := topics.offset
            switch topics.length
            case 0 { log0(start, size) }
            case 1 { log1(start, size, calldataload(topic)) }
            case 2 { log2(start, size, calldataload(topic), calldataload(add(topic, 32))) }
            case 3 {
                log3(start, size, calldataload(topic), calldataload(add(topic, 32)), calldataload(add(topic, 64)))
            }
            case 4 {
                log4(
                    start,
                    size,
                    calldataload(topic),
                    calldataload(add(topic, 32)),
                    calldataload(add(topic, 64)),
                    calldataload(add(topic, 96))
                )
            }
            default { revert(0, 0) }
        }
    }
}

/// The factory of the deployed generation. Each announcement follows the logs of the escrow's constructor.
contract EscrowFactory {
    event EscrowDeployed(
        address indexed escrow,
        address indexed payer,
        address indexed payee,
        address arbiter,
        uint256 amount,
        uint256 releaseDelay,
        uint8 approvalsRequired
    );

    // As the older ABI had it, without the arbiter.
    event EscrowDeployed(
        address indexed escrow,
        address indexed payer,
        address indexed payee,
        uint256 amount,
        uint256 releaseDelay,
        uint8 approvalsRequired
    );

    // Another of the factory's events, no business of the relayer's.
    event FeeChanged(uint256 fee);

    address[] public escrows;

    function getEscrowCount() external view returns (uint256) {
        return escrows.length;
    }

    function createEscrow(
        address payer,
        address payee,
        address arbiter,
        uint256 amount,
        uint256 releaseDelay,
        uint8 approvalsRequired
    ) public returns (address) {
        Escrow escrow = deploy(payer, payee, arbiter, amount, releaseDelay, approvalsRequired, address(0));
        announce(escrow);
        return address(escrow);
    }

    /// `n` escrows with parties of their own, in one transaction.
    function createMany(uint256 n) external {
        for (uint256 i = 0; i < n; i++) {
            uint160 party = uint160(0x1000 * (escrows.length + 1));
            createEscrow(address(party), address(party + 1), address(party + 2), 1 ether + escrows.length, 1 days, 2);
        }
    }

    /// A whole life in one transaction: created, approved by two, released.
    function createApproveRelease(
        address payer,
        address payee,
        address arbiter,
        uint256 amount,
        uint256 releaseDelay,
        uint8 approvalsRequired
    ) external returns (address) {
        Escrow escrow =
            Escrow(createEscrow(payer, payee, arbiter, amount, releaseDelay, approvalsRequired));
        escrow.approveAs(payer);
        escrow.approveAs(arbiter);
        escrow.release();
        return address(escrow);
    }

    /// The escrow's constructor approves for the payer: an `Approved` that precedes the announcement.
    function createApprovedInConstructor(
        address payer,
        address payee,
        address arbiter,
        uint256 amount,
        uint256 releaseDelay,
        uint8 approvalsRequired
    ) external returns (address) {
        Escrow escrow = deploy(payer, payee, arbiter, amount, releaseDelay, approvalsRequired, payer);
        announce(escrow);
        return address(escrow);
    }

    function createAnnouncedTwice(
        address payer,
        address payee,
        address arbiter,
        uint256 amount,
        uint256 releaseDelay,
        uint8 approvalsRequired
    ) external returns (address) {
        Escrow escrow = deploy(payer, payee, arbiter, amount, releaseDelay, approvalsRequired, address(0));
        announce(escrow);
        announce(escrow);
        return address(escrow);
    }

    /// Deploys without announcing: `announce` may follow in a later block.
    function createSilently(
        address payer,
        address payee,
        address arbiter,
        uint256 amount,
        uint256 releaseDelay,
        uint8 approvalsRequired
    ) external returns (address) {
        return address(deploy(payer, payee, arbiter, amount, releaseDelay, approvalsRequired, address(0)));
    }

    /// Announces, and announces again.
    function announce(Escrow escrow) public {
        emit EscrowDeployed(
            address(escrow),
            escrow.payer(),
            escrow.payee(),
            escrow.arbiter(),
            escrow.amount(),
            escrow.releaseDelay(),
            escrow.approvalsRequired()
        );
    }

    /// Announces as the older generation did.
    function announceOlder(Escrow escrow) external {
        emit EscrowDeployed(
            address(escrow),
            escrow.payer(),
            escrow.payee(),
            escrow.amount(),
            escrow.releaseDelay(),
            escrow.approvalsRequired()
        );
    }

    /// `n` approvals of one escrow, by approvers 1 to n, in one transaction.
    function approveMany(Escrow escrow, uint256 n) external {
        for (uint256 i = 1; i <= n; i++) {
            escrow.approveAs(address(uint160(i)));
        }
    }

    /// The four topics of an announcement, but 5 bytes of data where 128 belong.
    function emitTruncatedAnnouncement(address escrow) external {
        bytes32 topic = keccak256("EscrowDeployed(address,address,address,address,uint256,uint256,uint8)");
        assembly ("memory-safe") {
            log4(0, 5, topic, escrow, escrow, escrow)
        }
    }

    function emitUnknown() external {
        emit FeeChanged(1);
    }

    function deploy(
        address payer,
        address payee,
        address arbiter,
        uint256 amount,
        uint256 releaseDelay,
        uint8 approvalsRequired,
        address firstApprover
    ) internal returns (Escrow escrow) {
        escrow = new Escrow(payer, payee, arbiter, amount, releaseDelay, approvalsRequired, firstApprover);
        escrows.push(address(escrow));
    }
}
