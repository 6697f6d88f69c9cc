package firewall

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/sys"
)

// nfnlGroupNFTables is NFNLGRP_NFTABLES of uapi/linux/netfilter/nfnetlink.h.
const nfnlGroupNFTables = 7

// Pauses of Watch: one lets a transaction of others finish, the other keeps a
// quarrel with somebody who deletes our table again and again from burning CPU.
const (
	watchSettle = 10 * time.Millisecond
	watchRest   = time.Second
)

// Watch hears of changes to nftables and puts the table back as soon as
// somebody takes it, or a part of it, away (`nft flush ruleset`, a reload of a
// firewall service). Each result goes to report. It returns when ctx ends.
func (f *Firewall) Watch(ctx context.Context, report func(rebuilt bool, err error)) error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("open a netfilter socket: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		stop()
		_ = conn.Close()
	}()
	if err := conn.JoinGroup(nfnlGroupNFTables); err != nil {
		return fmt.Errorf("listen for nftables changes: %w", err)
	}
	for {
		msgs, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS): // more than the socket holds: look ourselves
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue
		case err != nil:
			return fmt.Errorf("read nftables changes: %w", err)
		case !f.concerned(msgs):
			continue
		}
		if !sys.Pause(ctx, watchSettle) {
			return nil
		}
		rebuilt, err := f.Ensure()
		if rebuilt || err != nil {
			report(rebuilt, err)
			if !sys.Pause(ctx, watchRest) {
				return nil
			}
			// What happened meanwhile, our own rebuild included.
			if rebuilt, err = f.Ensure(); rebuilt || err != nil {
				report(rebuilt, err)
			}
		}
	}
}

// concerned tells whether anything but set elements of our table was deleted.
// The name of the table is the first attribute of all of them.
func (f *Firewall) concerned(msgs []netlink.Message) bool {
	name := append([]byte(f.cfg.Table), 0)
	for _, m := range msgs {
		if uint16(m.Header.Type)>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < 4 {
			continue
		}
		switch uint16(m.Header.Type) & 0xff {
		case unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE, unix.NFT_MSG_DELSET:
		default:
			continue
		}
		ad, err := netlink.NewAttributeDecoder(m.Data[4:])
		if err != nil {
			continue
		}
		for ad.Next() {
			if ad.Type() == unix.NFTA_TABLE_NAME && bytes.Equal(ad.Bytes(), name) {
				return true
			}
		}
	}
	return false
}
