// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity 0.8.37;

// Nobody's escrow and nobody's factory. It emits the same events with the same topics; only its address tells that
// they mean nothing.
contract LookAlike {
    event EscrowDeployed(
        address indexed escrow,
        address indexed payer,
        address indexed payee,
        address arbiter,
        uint256 amount,
        uint256 releaseDelay,
        uint8 approvalsRequired
    );
    event Approved(address indexed approver);
    event EscrowReleased(address indexed payee, uint256 amount, uint256 timestamp);
    event EscrowRefunded(address indexed payer, uint256 amount, uint256 timestamp);

    function announce(address escrow) public {
        emit EscrowDeployed(escrow, msg.sender, msg.sender, msg.sender, 1, 1, 1);
    }

    function approve() public {
        emit Approved(msg.sender);
    }

    function release() public {
        emit EscrowReleased(msg.sender, 1, block.timestamp);
    }

    function refund() public {
        emit EscrowRefunded(msg.sender, 1, block.timestamp);
    }

    /// All of the above; announces itself.
    function emitAll() external {
        announce(address(this));
        approve();
        release();
        refund();
    }
}
