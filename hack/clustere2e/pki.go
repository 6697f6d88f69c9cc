package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// authority issues the certificates by which the parts of the cluster know each
// other. It lives as long as the run.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  crypto.Signer
}

func newAuthority(dir string) (*authority, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	a := &authority{dir: dir}
	return a, a.issue("ca", &x509.Certificate{
		Subject: pkix.Name{CommonName: "clustere2e"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	})
}

// client issues a certificate for a user of a group.
func (a *authority) client(name, user string, groups ...string) error {
	return a.issue(name, &x509.Certificate{
		Subject:     pkix.Name{CommonName: user, Organization: groups},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

// server issues a certificate for names and addresses.
func (a *authority) server(name string, hosts ...string) error {
	c := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			c.IPAddresses = append(c.IPAddresses, ip)
		} else {
			c.DNSNames = append(c.DNSNames, h)
		}
	}
	return a.issue(name, c)
}

// issue writes NAME.crt and NAME.key. The first certificate is the authority's own.
func (a *authority) issue(name string, c *x509.Certificate) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if c.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		return err
	}
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(24*time.Hour)
	if a.cert == nil {
		a.cert, a.key = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, key.Public(), a.key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(a.file(name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(a.file(name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600))
}

func (a *authority) file(name string) string { return filepath.Join(a.dir, name) }

const kubeconfigText = `apiVersion: v1
kind: Config
clusters: [{name: e2e, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: %[3]q, user: {client-certificate: %[4]q, client-key: %[5]q}}]
contexts: [{name: e2e, context: {cluster: e2e, user: %[3]q, namespace: e2e}}]
current-context: e2e
`

// kubeconfig issues a client's certificate, writes what it reaches the API server
// by, and returns that file.
func (a *authority) kubeconfig(name, user string, groups ...string) (string, error) {
	text := fmt.Sprintf(kubeconfigText, apiURL, a.file("ca.crt"), name, a.file(name+".crt"), a.file(name+".key"))
	file := a.file(name + ".kubeconfig")
	return file, errors.Join(a.client(name, user, groups...), os.WriteFile(file, []byte(text), 0o600))
}
