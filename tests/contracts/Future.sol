// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity 0.8.37;

// A generation nobody has told the relayer about: not even its announcements are known.

contract FutureEscrow {
    event Accepted(address indexed party, uint256 weight);

    function accept() external {
        emit Accepted(msg.sender, 1);
    }
}

contract FutureFactory {
    event EscrowOpened(address indexed escrow, address indexed payer, uint256 amount);

    function open() external returns (address escrow) {
        escrow = address(new FutureEscrow());
        emit EscrowOpened(escrow, msg.sender, 1 ether);
    }
}
