// Verifies checkpoints and proofs of vsql-sync with other people's code alone: the note and tlog packages of
// the Go project, and the Merkle tree and formats of transparency.dev. Nothing here hashes or verifies by
// itself but the one step C2SP leaves to the application: what a leaf is made of.
//
//	go run . inclusion PROOF LOG_VKEY [COSIGNER_VKEY …]
//	go run . consistency OLD_CHECKPOINT PROOF LOG_VKEY [COSIGNER_VKEY …]
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/transparency-dev/formats/log"
	fnote "github.com/transparency-dev/formats/note"
	fproof "github.com/transparency-dev/formats/proof"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "refused:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) >= 3 && args[0] == "inclusion":
		return inclusion(args[1], args[2], args[3:])
	case len(args) >= 4 && args[0] == "consistency":
		return consistency(args[1], args[2], args[3], args[4:])
	}
	return errors.New("usage: inclusion PROOF LOG_VKEY [COSIGNER_VKEY …] | " +
		"consistency OLD_CHECKPOINT PROOF LOG_VKEY [COSIGNER_VKEY …]")
}

// checkpoint verifies a signed note: the log's signature, and that of each cosigner.
func checkpoint(encoded []byte, logKey string, cosigners []string) (*log.Checkpoint, error) {
	// The Go project's own verifier for the log's signature …
	logVerifier, err := note.NewVerifier(logKey)
	if err != nil {
		return nil, fmt.Errorf("log key: %w", err)
	}
	var others []note.Verifier
	for _, key := range cosigners {
		// … and transparency.dev's for cosignature/v1, which the Go project does not know.
		other, err := fnote.NewVerifierForCosignatureV1(key)
		if err != nil {
			return nil, fmt.Errorf("cosigner key: %w", err)
		}
		others = append(others, other)
	}
	// The origin is the name of the log's key.
	head, _, opened, err := log.ParseCheckpoint(encoded, logVerifier.Name(), logVerifier, others...)
	if err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	if want := 1 + len(others); len(opened.Sigs) != want {
		return nil, fmt.Errorf("checkpoint: %d signatures by the keys given, expected %d", len(opened.Sigs), want)
	}
	for _, signature := range opened.Sigs {
		fmt.Printf("signed by %s (%08x)\n", signature.Name, signature.Hash)
	}
	fmt.Printf("origin %s\nsize %d\nroot %x\n", head.Origin, head.Size, head.Hash)
	return head, nil
}

func inclusion(path, logKey string, cosigners []string) error {
	encoded, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var read fproof.TLogProof
	if err := read.Unmarshal(encoded); err != nil {
		return err
	}
	head, err := checkpoint(read.Checkpoint, logKey, cosigners)
	if err != nil {
		return err
	}
	// What a leaf is made of: the SHA-256 of the signed document, which the proof carries.
	document := sha256.Sum256(read.ExtraData)
	leaf := rfc6962.DefaultHasher.HashLeaf(document[:])
	var hashes [][]byte
	var record tlog.RecordProof
	for _, one := range read.Hashes {
		hashes = append(hashes, bytes.Clone(one[:]))
		record = append(record, tlog.Hash(one))
	}
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, read.Index, head.Size, leaf, hashes, head.Hash); err != nil {
		return fmt.Errorf("transparency-dev/merkle: %w", err)
	}
	size, index := int64(head.Size), int64(read.Index)
	if err := tlog.CheckRecord(record, size, tlog.Hash(head.Hash), index, tlog.Hash(leaf)); err != nil {
		return fmt.Errorf("x/mod/sumdb/tlog: %w", err)
	}
	fmt.Printf("entry %d is in it (document of %d bytes, %d hashes)\n", read.Index+1, len(read.ExtraData), len(hashes))
	return nil
}

func consistency(oldPath, path, logKey string, cosigners []string) error {
	oldEncoded, err := os.ReadFile(oldPath)
	if err != nil {
		return err
	}
	old, err := checkpoint(oldEncoded, logKey, nil)
	if err != nil {
		return fmt.Errorf("old %w", err)
	}
	encoded, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	// The body of tlog-witness' add-checkpoint: an old line, hashes, an empty line, the checkpoint.
	head, rest, found := strings.Cut(string(encoded), "\n\n")
	if !found {
		return errors.New("no checkpoint behind the proof")
	}
	lines := strings.Split(head, "\n")
	if lines[0] != fmt.Sprintf("old %d", old.Size) {
		return fmt.Errorf("the proof begins with %q, the old checkpoint has %d entries", lines[0], old.Size)
	}
	later, err := checkpoint([]byte(rest), logKey, cosigners)
	if err != nil {
		return err
	}
	var hashes [][]byte
	var tree tlog.TreeProof
	for _, line := range lines[1:] {
		one, err := base64.StdEncoding.DecodeString(line)
		if err != nil || len(one) != sha256.Size {
			return fmt.Errorf("a line of the proof is no hash: %q", line)
		}
		hashes = append(hashes, one)
		tree = append(tree, tlog.Hash(one))
	}
	if err := proof.VerifyConsistency(rfc6962.DefaultHasher, old.Size, later.Size, hashes, old.Hash, later.Hash); err != nil {
		return fmt.Errorf("transparency-dev/merkle: %w", err)
	}
	sizes := []int64{int64(later.Size), int64(old.Size)}
	if err := tlog.CheckTree(tree, sizes[0], tlog.Hash(later.Hash), sizes[1], tlog.Hash(old.Hash)); err != nil {
		return fmt.Errorf("x/mod/sumdb/tlog: %w", err)
	}
	fmt.Printf("the first %d entries are a prefix of the %d (%d hashes)\n", old.Size, later.Size, len(hashes))
	return nil
}
