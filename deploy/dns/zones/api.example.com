; The parent zone, example.com, delegates this name, and has the addresses of the two name servers.
$TTL 3600
; The last number is for how long resolvers remember that there is no AAAA.
@ 60 SOA ns1.example.com. hostmaster.example.com. ( 1 7200 1800 1209600 60 )
@ NS ns1.example.com.
@ NS ns2.example.com.
; 10 s, and 5 s as soon as a check of a site has failed.
@ 10/5 DYNA weighted!sites
