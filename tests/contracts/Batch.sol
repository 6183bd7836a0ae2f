// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity 0.8.37;

// Several calls in one transaction. The callee sees this contract as the sender.
contract Batch {
    error CallFailed(uint256 index);

    function run(address[] calldata targets, bytes[] calldata calls) external {
        for (uint256 i = 0; i < targets.length; i++) {
            (bool ok,) = targets[i].call(calls[i]);
            if (!ok) revert CallFailed(i);
        }
    }
}
