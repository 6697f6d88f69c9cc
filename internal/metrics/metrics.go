// Package metrics is what Naru tells Prometheus about itself. The metrics of
// containers go the other way, by CRI; see the table in docs/operations.md,
// which a test compares with the one here.
//
// Every label has few values that are known beforehand: names of RPCs, steps and
// phases. No pod, container or image is named: a node's metrics stay as many as
// they are, and whoever may read them learns of counts only.
//
// It is a leaf: what there is at the moment of a scrape, a Source tells.
//
// Concurrency: all methods may be called concurrently. What is counted costs a
// few atomic additions; everything else is asked for at a scrape.
package metrics

import (
	"net/http"
	goruntime "runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Buckets, in seconds. RPCs are told apart from half a millisecond on, pulls
// from a tenth of a second.
var (
	fast = []float64{0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120}
	slow = []float64{0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800}
)

// scrapes is how many scrapes are answered at a time, scrapeTime how long one
// may take.
const (
	scrapes    = 2
	scrapeTime = 10 * time.Second
)

// Metrics counts.
type Metrics struct {
	registry *prometheus.Registry
	rpc      *prometheus.HistogramVec
	step     *prometheus.HistogramVec
	exits    *prometheus.CounterVec
	pull     *prometheus.HistogramVec
	bytes    prometheus.Counter
	reloads  *prometheus.CounterVec
	journal  prometheus.Counter
}

// New makes the metrics of a daemon of this version. Watch adds what its parts
// know.
func New(version string) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		rpc:      histogram(rpcs, fast), step: histogram(steps, fast), pull: histogram(pulls, slow),
		exits: counter(exits), reloads: counter(reloads),
		bytes:   prometheus.NewCounter(prometheus.CounterOpts{Name: pulledBytes.name, Help: pulledBytes.help}),
		journal: prometheus.NewCounter(prometheus.CounterOpts{Name: journalDropped.name, Help: journalDropped.help}),
	}
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: buildInfo.name, Help: buildInfo.help}, buildInfo.labels)
	build.WithLabelValues(version, goruntime.Version()).Set(1)
	m.registry.MustRegister(m.rpc, m.step, m.exits, m.pull, m.bytes, m.reloads, m.journal, build,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Watch has s asked at each scrape. It is called once.
func (m *Metrics) Watch(s Source) { m.registry.MustRegister(&collector{source: s}) }

func histogram(d desc, buckets []float64) *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: d.name, Help: d.help, Buckets: buckets}, d.labels)
}

func counter(d desc) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: d.name, Help: d.help}, d.labels)
}

// ObserveRPC counts a call that ended (cri.Metrics).
func (m *Metrics) ObserveRPC(method, code string, took time.Duration) {
	m.rpc.WithLabelValues(method, code).Observe(took.Seconds())
}

// Step counts a step of an operation on a pod or container.
func (m *Metrics) Step(operation, step string, took time.Duration) {
	m.step.WithLabelValues(operation, step).Observe(took.Seconds())
}

// Exit counts the end of a container.
func (m *Metrics) Exit(reason string) { m.exits.WithLabelValues(reason).Inc() }

// Pull counts a pull that ended; result is ok or a class of errors.
func (m *Metrics) Pull(result string, took time.Duration, bytes int64) {
	m.pull.WithLabelValues(result).Observe(took.Seconds())
	m.bytes.Add(float64(max(bytes, 0)))
}

// Reload counts a reload of the configuration.
func (m *Metrics) Reload(result string) { m.reloads.WithLabelValues(result).Inc() }

// JournalDropped counts lines that the journal did not take.
func (m *Metrics) JournalDropped(lines uint64) { m.journal.Add(float64(lines)) }

// Handler answers scrapes.
func (m *Metrics) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: scrapes, Timeout: scrapeTime}))
	return mux
}
