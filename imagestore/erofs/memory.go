package erofs

// What things take of memory, in bytes: measured with Go 1.26 on 64 bits and rounded up, with what they add while
// the image is finished. Texts and lists of chunks come on top, and what the garbage collector has not yet found
// (by default as much again).
const (
	opCost    = 88  // of an entry of a layer until it is applied
	inodeCost = 216 // 160, and its place in the image, for which the list has grown
	nameCost  = 32  // a place in the sorted list, what a short text is rounded up to
	dirCost   = 128 // without its map of names
	deadCost  = 20  // of an extent that nobody needs any more
)

// mapCost is what a directory's map of so many names takes. It has one group of eight first, and then between 7/16
// and 7/8 of it is in use.
func mapCost(names int) int64 {
	switch {
	case names == 0:
		return 0
	case names <= 8:
		return 288
	}
	return 640 + 80*int64(names-9)
}

// cost is what an inode takes, without names.
func (n *inode) cost() int64 {
	cost := inodeCost + cap(n.xattrs) + len(n.target) + 4*cap(n.chunks)
	if n.dir != nil {
		cost += dirCost
	}
	return int64(cost)
}

// cost is what an entry takes until it is applied, without the name of its directory.
func (o op) cost() int64 {
	cost := int64(opCost + len(o.base) + len(o.target))
	if o.inode != nil {
		cost += o.inode.cost()
	}
	return cost
}

// fits wants that what the tree, and layers that are read and not yet applied, hold is within the limit.
func (t *tree) fits() error {
	if t.held.Load() > t.limit.Memory {
		return exhausted("names and attributes of the image and of two layers take more than %d bytes of memory; build the image with fewer files, or in smaller layers", t.limit.Memory)
	}
	return nil
}
