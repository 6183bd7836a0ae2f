// Compiles the contracts of this folder into artifact.json.
//
//     node tests/contracts/compile.mjs            writes tests/contracts/artifact.json
//     node tests/contracts/compile.mjs --stdout   prints it instead
//
// The compiler is npm's `solc`, pinned below, installed under the target directory and nowhere else.

import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const SOLC = "0.8.37";

const here = dirname(fileURLToPath(import.meta.url));
const target = process.env.CARGO_TARGET_DIR ?? join(here, "..", "..", "target");

/** The compiler; installed beside its place and then renamed into it, so that a half-made install is never used. */
function solc() {
    const home = resolve(target, "node", `solc-${SOLC}`);
    if (!existsSync(home)) {
        mkdirSync(dirname(home), { recursive: true });
        const fresh = mkdtempSync(`${home}-`);
        writeFileSync(join(fresh, "package.json"), '{ "private": true }\n');
        const options = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"];
        const windows = process.platform === "win32";
        execFileSync(windows ? "npm.cmd" : "npm", ["install", ...options, `solc@${SOLC}`], {
            cwd: fresh,
            shell: windows,
            stdio: ["ignore", "ignore", "inherit"],
        });
        try {
            renameSync(fresh, home);
        } catch (error) {
            rmSync(fresh, { recursive: true });
            if (!existsSync(home)) throw error; // otherwise somebody else was faster: theirs is as good
        }
    }
    return createRequire(join(home, "package.json"))("solc");
}

const names = readdirSync(here).filter((name) => name.endsWith(".sol")).sort();
const sources = Object.fromEntries(names.map((name) => [name, { content: readFileSync(join(here, name), "utf8") }]));
const input = {
    language: "Solidity",
    sources,
    settings: {
        // Few runs: a hundred escrows are deployed more often than any of them is called.
        optimizer: { enabled: true, runs: 1 },
        // Understood by every chain and by any anvil.
        evmVersion: "paris",
        // The bytecode then depends on the code alone, not on comments and file names.
        metadata: { appendCBOR: false, bytecodeHash: "none" },
        outputSelection: { "*": { "*": ["abi", "evm.bytecode.object"] } },
    },
};

const compiler = solc();
const output = JSON.parse(compiler.compile(JSON.stringify(input)));
for (const { formattedMessage } of output.errors ?? []) process.stderr.write(formattedMessage);
if (output.errors?.length) process.exit(1); // warnings too: these contracts have none

const artifact = {
    solc: compiler.version(),
    sources: Object.fromEntries(
        names.map((name) => [name, createHash("sha256").update(sources[name].content).digest("hex")]),
    ),
    contracts: {},
};
for (const name of names) {
    for (const [contract, { abi, evm }] of Object.entries(output.contracts[name])) {
        artifact.contracts[contract] = { abi, bytecode: `0x${evm.bytecode.object}` };
    }
}

const text = `${JSON.stringify(artifact, null, 1)}\n`;
if (process.argv.includes("--stdout")) process.stdout.write(text);
else writeFileSync(join(here, "artifact.json"), text);
