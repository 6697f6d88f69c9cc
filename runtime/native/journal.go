package native

import (
	"context"
	"encoding/binary"

	"github.com/naru-project/naru/runtime"
)

// sendToJournal has the monitor send what the container writes to the journal,
// too, if it is asked for.
func (x *Executor) sendToJournal(ctx context.Context, c *runtime.Container) error {
	if c.Journal == "" {
		return nil
	}
	return x.cfg.Monitor.JournalFields(ctx, c.ID, journalFields(c))
}

// journalFields are those that conmon sends with each line, but for PRIORITY,
// CONTAINER_PARTIAL_MESSAGE and MESSAGE itself.
func journalFields(c *runtime.Container) []byte {
	const longest = 1 << 10
	var b []byte
	for _, f := range [][2]string{
		{"CONTAINER_ID_FULL", c.ID}, {"CONTAINER_ID", c.ID[:min(len(c.ID), 12)]}, {"CONTAINER_NAME", c.Journal[:min(len(c.Journal), longest)]},
		{"SYSLOG_IDENTIFIER", c.ID[:min(len(c.ID), 12)]},
	} {
		// With its length before it, a value holds no further field, whatever it says.
		b = append(append(b, f[0]...), '\n')
		b = append(binary.LittleEndian.AppendUint64(b, uint64(len(f[1]))), f[1]...)
		b = append(b, '\n')
	}
	return b
}
