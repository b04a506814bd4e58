-- Makes a ledger at its full length, unless it is there.
-- KEYS  1 meta, 2 bits.  ARGV  1 dataset, 2 count.
-- Answers dataset and count of what is there. Bits without meta, or meta without bits, are what a
-- loss left over: never completed, since that would read a lost ledger as an untouched one.
local meta = redis.call('HMGET', KEYS[1], 'dataset', 'count')
local length = redis.call('STRLEN', KEYS[2])
if meta[1] or length > 0 then
  if not meta[1] or length * 8 < tonumber(meta[2]) then return {'damaged'} end
  return {meta[1], tonumber(meta[2])}
end
local count = tonumber(ARGV[2])
if count > 0 then redis.call('SETBIT', KEYS[2], count - 1, 0) end
redis.call('HSET', KEYS[1], 'dataset', ARGV[1], 'seq', 0, 'count', count)
return {ARGV[1], count}
