package erofs

import (
	"slices"
	"strings"
)

const (
	xattrHeader   = 12
	maxXattrValue = 1<<16 - 1
	maxXattrs     = xattrHeader + 4*(1<<16-2)
	paxXattr      = "SCHILY.xattr."
)

// xattrPrefixes are the namespaces the format knows, by index. The ACLs are whole names.
var xattrPrefixes = []struct {
	prefix string
	index  byte
}{
	{"user.", 1},
	{"system.posix_acl_access", 2},
	{"system.posix_acl_default", 3},
	{"trusted.", 4},
	{"security.", 6},
}

// overlayXattrs belong to the overlay that an image becomes the lower directory of: an image that
// brings its own could make files of other layers appear or vanish.
var overlayXattrs = []string{"trusted.overlay.", "user.overlay."}

// encodeXattrs makes the on-disk form of the extended attributes in PAX records; nil for none.
// Attributes of namespaces that Linux file systems don't store are left out, as by an unpack.
func encodeXattrs(records map[string]string) ([]byte, error) {
	var names []string
	for record := range records {
		if name, ok := strings.CutPrefix(record, paxXattr); ok && storable(name) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil, nil
	}
	slices.Sort(names)
	out := make([]byte, xattrHeader)
	for _, name := range names {
		value := records[paxXattr+name]
		index, suffix := splitXattr(name)
		if len(suffix) > maxName || len(value) > maxXattrValue {
			return nil, invalid("extended attribute %.64q is too long", name)
		}
		out = append(out, byte(len(suffix)), index, 0, 0)
		le.PutUint16(out[len(out)-2:], uint16(len(value)))
		out = append(out, suffix...)
		out = append(out, value...)
		out = append(out, zeros[:roundUp(int64(len(out)), 4)-int64(len(out))]...)
	}
	if len(out) > maxXattrs {
		return nil, invalid("extended attributes take %d bytes, at most %d are possible", len(out), maxXattrs)
	}
	return out, nil
}

func storable(name string) bool {
	for _, prefix := range overlayXattrs {
		if strings.HasPrefix(name, prefix) {
			return false
		}
	}
	index, _ := splitXattr(name)
	return index != 0
}

// splitXattr returns the index of the name's namespace, 0 if there is none, and what follows it.
func splitXattr(name string) (byte, string) {
	for _, x := range xattrPrefixes {
		suffix, ok := strings.CutPrefix(name, x.prefix)
		if whole := !strings.HasSuffix(x.prefix, "."); ok && (suffix == "") == whole {
			return x.index, suffix
		}
	}
	return 0, ""
}

// xattrCount is the inode's i_xattr_icount.
func xattrCount(encoded []byte) uint16 {
	if len(encoded) == 0 {
		return 0
	}
	return uint16((len(encoded)-xattrHeader)/4 + 1)
}
