-- Sets the status of a run where it is older than this version: a replayed command undoes nothing.
-- KEYS  1 run.  ARGV  1 version, then fields and values.  Answers 1 if set.
local known = redis.call('HGET', KEYS[1], 'version')
if known and tonumber(known) >= tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[1], unpack(ARGV, 2))
return 1
