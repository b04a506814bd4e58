-- Hears what an account's provider answered (transforms/shaping.py has the rules).
-- KEYS  1 account.  ARGV  1 ok, 2 failed, 3 Retry-After in us, or '' if none was throttled.
-- Answers factor in millionths, blocked until ms, circuit, open until ms, now us.
redis.replicate_commands()
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local NAMES = {'factor', 'cut', 'changed', 'blocked', 'window', 'ok', 'failed', 'until', 'half', 'probes',
  'good', 'cool'}
local found = redis.call('HMGET', KEYS[1], unpack(NAMES))
local a = {factor = 1, cool = COOL_US}
for i, name in ipairs(NAMES) do a[name] = tonumber(found[i] or a[name] or 0) end
local ok, failed, retry_after = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])

if retry_after then
  a.blocked = math.max(a.blocked, now + retry_after)
  if now - a.cut >= SECOND_US then
    a.factor, a.cut, a.changed = math.max(FACTOR_FLOOR, a.factor * CUT), now, now
  end
elseif ok > 0 and a.factor < 1 and now - a.changed >= SECOND_US then
  a.factor, a.changed = math.min(1, a.factor + RAISE_PER_SECOND), now
end

if a['until'] ~= 0 then
  if a.half == 1 and failed > 0 then
    a.half, a.probes, a.cool = 0, 0, math.min(COOL_MOST_US, a.cool * 2)
    a['until'] = now + a.cool
  elseif a.half == 1 then
    a.good = a.good + ok
    if a.good >= PROBES_GOOD then
      a.half, a.good, a['until'], a.cool = 0, 0, 0, COOL_US
      a.window, a.ok, a.failed = now, 0, 0
    end
  end
else
  if now - a.window >= WINDOW_US then a.window, a.ok, a.failed = now, 0, 0 end
  a.ok, a.failed = a.ok + ok, a.failed + failed
  if a.failed >= FAILURES and a.failed >= FAILED_SHARE * (a.ok + a.failed) then
    a.half, a.probes, a['until'] = 0, 0, now + a.cool
  end
end

local writes = {}
for i, name in ipairs(NAMES) do
  if a[name] ~= tonumber(found[i]) then
    writes[#writes + 1] = name
    writes[#writes + 1] = a[name]
  end
end
if #writes > 0 then redis.call('HSET', KEYS[1], unpack(writes)) end
local circuit = a['until'] == 0 and 'closed' or a.half == 1 and 'half_open' or 'open'
return {math.floor(a.factor * 1000000 + 0.5), math.ceil(a.blocked / 1000), circuit,
  math.ceil(a['until'] / 1000), now}
