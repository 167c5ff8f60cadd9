package machine

// DiskID is the id that drivers give a disk's device.
func DiskID(serial string) string { return "disk-" + serial }

// Claim notes that the VM has a disk, as the device id, unless its serial is in use.
func (v *VM) Claim(serial, id string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.devices[serial]; ok {
		return false
	}
	v.devices[serial] = id
	return true
}

// Release notes that the VM does not have the disk any more.
func (v *VM) Release(serial string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.devices, serial)
}

// Device is the id of a disk's device.
func (v *VM) Device(serial string) (id string, ok bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	id, ok = v.devices[serial]
	return id, ok
}

// Leaving returns a channel that Left closes.
func (v *VM) Leaving(id string) <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	gone := make(chan struct{})
	v.leaving[id] = gone
	return gone
}

// Left is called when the guest has let go of a device.
func (v *VM) Left(id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if gone, ok := v.leaving[id]; ok {
		close(gone)
		delete(v.leaving, id)
	}
}
