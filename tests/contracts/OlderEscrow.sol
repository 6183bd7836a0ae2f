// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity 0.8.37;

// The older generation: an announcement without arbiter, a release and a refund without timestamp.

contract OlderEscrow {
    event Approved(address indexed approver);
    event EscrowReleased(address indexed payee, uint256 amount);
    event EscrowRefunded(address indexed payer, uint256 amount);

    address public immutable payer;
    address public immutable payee;
    uint256 public immutable amount;

    uint256 public approvalsCount;

    constructor(address payer_, address payee_, uint256 amount_) {
        payer = payer_;
        payee = payee_;
        amount = amount_;
    }

    function approve() external {
        approvalsCount += 1;
        emit Approved(msg.sender);
    }

    function release() external {
        emit EscrowReleased(payee, amount);
    }

    function refund() external {
        emit EscrowRefunded(payer, amount);
    }
}

contract OlderFactory {
    event EscrowDeployed(
        address indexed escrow,
        address indexed payer,
        address indexed payee,
        uint256 amount,
        uint256 releaseDelay,
        uint8 approvalsRequired
    );

    uint256 public getEscrowCount;

    function createEscrow(
        address payer,
        address payee,
        uint256 amount,
        uint256 releaseDelay,
        uint8 approvalsRequired
    ) external returns (address) {
        OlderEscrow escrow = new OlderEscrow(payer, payee, amount);
        getEscrowCount += 1;
        emit EscrowDeployed(address(escrow), payer, payee, amount, releaseDelay, approvalsRequired);
        return address(escrow);
    }
}
