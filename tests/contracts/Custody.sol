// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity 0.8.37;

// Escrows that hold money and have rules, with the functions and the behaviour of the deployed ones: who may approve,
// when a release is due, and that the approval which makes it due releases at once.

contract Custody {
    event EscrowCreated(
        address indexed payer, address indexed payee, uint256 amount, uint256 releaseTime, uint8 approvalsRequired
    );
    event Approved(address indexed approver);
    event EscrowReleased(address indexed payee, uint256 amount, uint256 timestamp);
    event EscrowRefunded(address indexed payer, uint256 amount, uint256 timestamp);

    address public immutable payer;
    address public immutable payee;
    address public immutable arbiter;
    uint256 public immutable amount;
    uint256 public immutable releaseTime;
    uint8 public immutable approvalsRequired;

    uint8 public approvalsCount;
    bool public released;
    bool public refunded;
    mapping(address => bool) public approvals;

    modifier whileOpen() {
        require(!released, "already released");
        require(!refunded, "already refunded");
        _;
    }

    constructor(address payer_, address payee_, uint256 delay, uint8 needed, address arbiter_) payable {
        require(msg.value > 0, "no amount");
        require(payee_ != address(0), "no payee");
        require(needed >= 1 && needed <= 3, "1 to 3 approvals");
        require(needed < 3 || arbiter_ != address(0), "three approvals need an arbiter");
        (payer, payee, arbiter, amount) = (payer_, payee_, arbiter_, msg.value);
        (releaseTime, approvalsRequired) = (block.timestamp + delay, needed);
        emit EscrowCreated(payer_, payee_, msg.value, releaseTime, needed);
    }

    function approve() external whileOpen {
        require(msg.sender == payer || msg.sender == payee || msg.sender == arbiter, "not a party");
        require(!approvals[msg.sender], "already approved");
        approvals[msg.sender] = true;
        approvalsCount += 1;
        emit Approved(msg.sender);
        if (approvalsCount >= approvalsRequired && block.timestamp >= releaseTime) pay();
    }

    function release() external whileOpen {
        require(block.timestamp >= releaseTime, "too early");
        require(approvalsCount >= approvalsRequired, "too few approvals");
        pay();
    }

    function refund() external whileOpen {
        require(msg.sender == payer, "not the payer");
        require(block.timestamp >= releaseTime + 30 days, "too early");
        refunded = true;
        emit EscrowRefunded(payer, amount, block.timestamp);
        send(payer);
    }

    function pay() private {
        released = true;
        emit EscrowReleased(payee, amount, block.timestamp);
        send(payee);
    }

    function send(address to) private {
        (bool sent,) = to.call{value: amount}("");
        require(sent, "not taken");
    }
}

contract CustodyFactory {
    event EscrowDeployed(
        address indexed escrow,
        address indexed payer,
        address indexed payee,
        address arbiter,
        uint256 amount,
        uint256 releaseDelay,
        uint8 approvalsRequired
    );

    uint256 public getEscrowCount;

    function createEscrow(address payee, uint256 releaseDelay, uint8 approvalsRequired, address arbiter)
        external
        payable
        returns (address escrow)
    {
        escrow = address(
            new Custody{value: msg.value}(msg.sender, payee, releaseDelay, approvalsRequired, arbiter)
        );
        getEscrowCount += 1;
        emit EscrowDeployed(escrow, msg.sender, payee, arbiter, msg.value, releaseDelay, approvalsRequired);
    }
}
