"""Who else is interested: mDNS, an embedded Kademlia DHT, bootstrap addresses."""
